// Records the file operations below a folder, and lets one of them fail: to be loaded with LD_PRELOAD.
//
// Every operation that changes a file or folder below $RECORDER_ROOT is appended to $RECORDER_LOG when it has succeeded,
// as a line "NUMBER <tab> KIND <tab> OFFSET <tab> LENGTH <tab> PATH <tab> PATH2" and LENGTH bytes of data, ended by a
// newline. NUMBER counts the operations that were tried, and is what names the one that shall fail. What a process
// writes without these functions (buffered by C, or through mapped memory) shows in the "content" of a file,
// which is recorded whole before it is flushed and when it is closed. Recording begins with recorder_begin(), or at the
// start of a process for those that a recorded one starts.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int log_fd = -1;
static long operations, fail_at;
static int fail_with, full;
static __thread int inside; // what the recorder does itself is not recorded
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) {
    void *found = dlsym(RTLD_NEXT, name);
    if (!found) abort();
    return found;
}

// `number`: of the operation, from 1, that fails with `error`; 0 for none. After ENOSPC nothing grows any more.
void recorder_begin(long number, int error) {
    const char *folder = getenv("RECORDER_ROOT"), *log = getenv("RECORDER_LOG");
    if (!folder || !log) return;
    snprintf(root, sizeof root, "%s", folder);
    log_fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    operations = full = 0;
    fail_at = number;
    fail_with = error;
}

__attribute__((constructor)) static void begin_in_child(void) {
    if (getenv("RECORDER_ON")) recorder_begin(0, 0);
}

static int below(const char *path) {
    size_t n = strlen(root);
    return log_fd >= 0 && !inside && n && !strncmp(path, root, n) && path[n] == '/';
}

static void of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
}

static void absolute(int folder, const char *name, char *path) {
    char base[PATH_MAX] = "";
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
    } else {
        if (folder != AT_FDCWD) of_fd(folder, base);
        else if (!getcwd(base, sizeof base)) base[0] = 0;
        snprintf(path, PATH_MAX, "%.2000s/%.2000s", base, name);
    }
}

static void record(const char *kind, long long offset, const void *data, size_t length, const char *a, const char *b) {
    char head[3 * PATH_MAX];
    int n = snprintf(head, sizeof head, "%ld\t%s\t%lld\t%zu\t%s\t%s\n", operations, kind, offset, length, a, b);
    struct iovec parts[] = {{head, n}, {(void *)data, length}, {"\n", 1}};
    if (REAL(writev)(log_fd, parts, 3) != (ssize_t)(n + length + 1)) abort();
}

// Whether this operation is the one that fails; `grows`: it needs space.
static int fails(int grows) {
    int hit = ++operations == fail_at;
    if (hit && fail_with == ENOSPC) full = 1;
    if (!hit && !(full && grows)) return 0;
    errno = fail_with;
    return 1;
}

static void content(int fd, const char *path) {
    char link[64];
    struct stat status;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int copy = REAL(open)(link, O_RDONLY | O_CLOEXEC);
    if (copy < 0) return;
    if (!fstat(copy, &status) && S_ISREG(status.st_mode) && status.st_nlink) {
        char *data = malloc(status.st_size + 1);
        ssize_t n = pread(copy, data, status.st_size, 0);
        if (n == status.st_size) record("content", 0, data, n, path, "");
        free(data);
    }
    REAL(close)(copy);
}

#define ENTER pthread_mutex_lock(&mutex), inside++
#define LEAVE inside--, pthread_mutex_unlock(&mutex)

// ---- opening --------------------------------------------------------------------------------------------------------

static int opened(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    struct stat status;
    absolute(folder, name, path);
    if (!below(path) || (flags & O_TMPFILE) == O_TMPFILE || !((flags & O_ACCMODE) || flags & (O_CREAT | O_TRUNC)))
        return REAL(openat)(folder, name, flags, mode);
    ENTER;
    int there = !stat(path, &status), fd = -1;
    int creates = !there && flags & O_CREAT, empties = there && flags & O_TRUNC && status.st_size;
    if (!((creates || empties) && fails(creates))) fd = REAL(openat)(folder, name, flags, mode);
    if (fd >= 0 && creates) record("create", 0, "", 0, path, "");
    if (fd >= 0 && empties) record("truncate", 0, "", 0, path, "");
    LEAVE;
    return fd;
}

#define OPEN(name, parameters, folder)                                              \
    int name parameters {                                                           \
        mode_t mode = 0;                                                            \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                  \
            va_list more;                                                           \
            va_start(more, flags);                                                  \
            mode = va_arg(more, mode_t);                                            \
            va_end(more);                                                           \
        }                                                                           \
        return opened(folder, path, flags, mode);                                   \
    }
OPEN(open, (const char *path, int flags, ...), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), AT_FDCWD)
OPEN(openat, (int folder, const char *path, int flags, ...), folder)
OPEN(openat64, (int folder, const char *path, int flags, ...), folder)

int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode); }

static FILE *fopened(const char *name, const char *mode, FILE *(*plain)(const char *, const char *)) {
    char path[PATH_MAX];
    struct stat status;
    absolute(AT_FDCWD, name, path);
    if (!below(path) || (mode[0] == 'r' && !strchr(mode, '+'))) return plain(name, mode);
    ENTER;
    FILE *file = NULL;
    int there = !stat(path, &status), creates = !there && mode[0] != 'r';
    int empties = there && mode[0] == 'w' && status.st_size;
    if (!((creates || empties) && fails(creates))) file = plain(name, mode);
    if (file && creates) record("create", 0, "", 0, path, "");
    if (file && empties) record("truncate", 0, "", 0, path, "");
    LEAVE;
    return file;
}
FILE *fopen(const char *path, const char *mode) { return fopened(path, mode, REAL(fopen)); }
FILE *fopen64(const char *path, const char *mode) { return fopened(path, mode, REAL(fopen64)); }

// ---- writing --------------------------------------------------------------------------------------------------------

static int regular(int fd, char *path) {
    struct stat status;
    if (log_fd < 0 || inside || fd < 0) return 0;
    of_fd(fd, path);
    return below(path) && !fstat(fd, &status) && S_ISREG(status.st_mode);
}

// Where the `n` bytes that were just written begin.
static long long begin_of(int fd, size_t n) {
    return lseek(fd, 0, SEEK_CUR) - (long long)n; // after O_APPEND, too, the position is the end
}

ssize_t write(int fd, const void *data, size_t length) {
    char path[PATH_MAX];
    if (!regular(fd, path)) return REAL(write)(fd, data, length);
    ENTER;
    ssize_t n = fails(1) ? -1 : REAL(write)(fd, data, length);
    if (n > 0) record("write", begin_of(fd, n), data, n, path, "");
    LEAVE;
    return n;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    if (!regular(fd, path)) return REAL(writev)(fd, parts, count);
    ENTER;
    ssize_t n = fails(1) ? -1 : REAL(writev)(fd, parts, count), left = n;
    for (int i = 0; i < count && left > 0; i++) {
        ssize_t part = (ssize_t)parts[i].iov_len < left ? (ssize_t)parts[i].iov_len : left;
        if (part) record("write", begin_of(fd, left), parts[i].iov_base, part, path, "");
        left -= part;
    }
    LEAVE;
    return n;
}

#define PWRITE(name, type)                                                           \
    ssize_t name(int fd, const void *data, size_t length, type offset) {             \
        char path[PATH_MAX];                                                         \
        if (!regular(fd, path)) return REAL(name)(fd, data, length, offset);         \
        ENTER;                                                                       \
        ssize_t n = fails(1) ? -1 : REAL(name)(fd, data, length, offset);            \
        if (n > 0) record("write", offset, data, n, path, "");                       \
        LEAVE;                                                                       \
        return n;                                                                    \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

// The kernel copies: what it copied shows in the content of the file when that is closed.
#define SENDFILE(name, type)                                                         \
    ssize_t name(int out, int in, type *offset, size_t length) {                     \
        char path[PATH_MAX];                                                         \
        if (!regular(out, path)) return REAL(name)(out, in, offset, length);         \
        ENTER;                                                                       \
        ssize_t n = fails(1) ? -1 : REAL(name)(out, in, offset, length);             \
        if (n > 0) content(out, path);                                               \
        LEAVE;                                                                       \
        return n;                                                                    \
    }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t length, unsigned flags) {
    char path[PATH_MAX];
    if (!regular(out, path)) return REAL(copy_file_range)(in, in_at, out, out_at, length, flags);
    ENTER;
    ssize_t n = fails(1) ? -1 : REAL(copy_file_range)(in, in_at, out, out_at, length, flags);
    if (n > 0) content(out, path);
    LEAVE;
    return n;
}

#define FTRUNCATE(name, type)                                                        \
    int name(int fd, type length) {                                                  \
        char path[PATH_MAX];                                                         \
        if (!regular(fd, path)) return REAL(name)(fd, length);                       \
        ENTER;                                                                       \
        int status = fails(1) ? -1 : REAL(name)(fd, length);                         \
        if (!status) record("truncate", length, "", 0, path, "");                    \
        LEAVE;                                                                       \
        return status;                                                               \
    }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

// ---- flushing and closing -------------------------------------------------------------------------------------------

#define FSYNC(name)                                                                  \
    int name(int fd) {                                                               \
        char path[PATH_MAX];                                                         \
        of_fd(fd, path);                                                             \
        if (!below(path) && strcmp(path, root)) return REAL(name)(fd);               \
        ENTER;                                                                       \
        content(fd, path);                                                           \
        int status = fails(1) ? -1 : 0; /* the real one would only take time */      \
        if (!status) record("sync", 0, "", 0, path, "");                             \
        LEAVE;                                                                       \
        return status;                                                               \
    }
FSYNC(fsync)
FSYNC(fdatasync)

int close(int fd) {
    char path[PATH_MAX];
    if (regular(fd, path) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY) {
        ENTER;
        content(fd, path);
        LEAVE;
    }
    return REAL(close)(fd);
}

int fclose(FILE *file) {
    char path[PATH_MAX];
    int fd = fileno(file);
    if (regular(fd, path) && (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY) {
        fflush(file);
        ENTER;
        content(fd, path);
        LEAVE;
    }
    return REAL(fclose)(file);
}

// ---- names ----------------------------------------------------------------------------------------------------------

#define NAMED(function, parameters, kind, grows, folder, name, call)                 \
    int function parameters {                                                        \
        char path_[PATH_MAX];                                                        \
        absolute(folder, name, path_);                                               \
        if (!below(path_)) return REAL(function) call;                               \
        ENTER;                                                                       \
        int status = fails(grows) ? -1 : REAL(function) call;                        \
        if (!status) record(kind, 0, "", 0, path_, "");                              \
        LEAVE;                                                                       \
        return status;                                                               \
    }
NAMED(mkdir, (const char *path, mode_t mode), "mkdir", 1, AT_FDCWD, path, (path, mode))
NAMED(mkdirat, (int folder, const char *path, mode_t mode), "mkdir", 1, folder, path, (folder, path, mode))
NAMED(unlink, (const char *path), "unlink", 0, AT_FDCWD, path, (path))
NAMED(unlinkat, (int folder, const char *path, int flags), flags & AT_REMOVEDIR ? "rmdir" : "unlink", 0, folder, path,
      (folder, path, flags))
NAMED(rmdir, (const char *path), "rmdir", 0, AT_FDCWD, path, (path))
NAMED(remove, (const char *path), "unlink", 0, AT_FDCWD, path, (path))

static int renamed(int a, const char *from, int b, const char *to, unsigned flags) {
    char old[PATH_MAX], new[PATH_MAX];
    absolute(a, from, old);
    absolute(b, to, new);
    if (!below(old) && !below(new)) return REAL(renameat2)(a, from, b, to, flags);
    ENTER;
    int status = fails(0) ? -1 : REAL(renameat2)(a, from, b, to, flags);
    if (!status) record(flags & RENAME_EXCHANGE ? "exchange" : "rename", 0, "", 0, old, new);
    LEAVE;
    return status;
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return renamed(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return renamed(a, from, b, to, flags); }
