// Places each tensor against a page that nothing may touch: to be loaded with LD_PRELOAD, before the C of rsengine runs.
//
// PyTorch asks for the memory of a tensor with posix_memalign, our C for its own with aligned_alloc. Each block ends
// where an inaccessible page begins, to the next multiple of its alignment: an access past that ends the process by a
// signal. The bytes between the block and its page, and those before it, hold a pattern that is looked at when the
// block is freed; where it has changed the process says so and ends. A freed block becomes inaccessible.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096, PATTERN = 0xA5 };
static const uint64_t SPACE = 1ull << 42; // of addresses, none of which is used twice
static uint8_t *space;
static _Atomic uint64_t used;

// Fills a page of its own in front of the pages of a block.
typedef struct {
    size_t size, pages;
    uint8_t *block;
} header;

extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);
extern void *__libc_realloc(void *, size_t);

static void end(const char *why) {
    write(STDERR_FILENO, why, strlen(why));
    abort();
}

__attribute__((constructor)) static void reserve(void) {
    space = mmap(NULL, SPACE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) end("guard pages: no addresses\n");
}

static void *guarded(size_t alignment, size_t size) {
    size_t padded = (size + alignment - 1) / alignment * alignment, pages = (padded + PAGE - 1) / PAGE;
    uint64_t at = __atomic_fetch_add(&used, (pages + 2) * PAGE, __ATOMIC_RELAXED);
    if (at + (pages + 2) * PAGE > SPACE) end("guard pages: all addresses are used\n");
    header *head = (header *)(space + at);
    if (mprotect(head, (pages + 1) * PAGE, PROT_READ | PROT_WRITE)) end("guard pages: no memory, or too many blocks\n");
    uint8_t *first = (uint8_t *)head + PAGE, *block = first + pages * PAGE - padded;
    *head = (header){size, pages, block};
    memset(first, PATTERN, block - first);
    memset(block + size, PATTERN, padded - size);
    return block;
}

static header *header_of(void *block) { return (header *)(((uintptr_t)block & ~(uintptr_t)(PAGE - 1)) - PAGE); }

static int is_guarded(void *block) { return space && (uint8_t *)block >= space && (uint8_t *)block < space + SPACE; }

static void release(void *block) {
    header *head = header_of(block);
    uint8_t *first = (uint8_t *)head + PAGE, *last = first + head->pages * PAGE;
    if (head->block != block) end("guard pages: what is freed is no block\n");
    for (uint8_t *byte = first; byte < last; byte++) {
        if (byte == head->block) byte += head->size;
        if (byte < last && *byte != PATTERN) end("guard pages: a byte beside a block was written\n");
    }
    if (mmap(head, (head->pages + 1) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
        MAP_FAILED)
        end("guard pages: too many blocks\n");
}

// Smaller alignments are asked for by compilers, for more blocks than a process may have mappings.
static int is_guarded_kind(size_t alignment, size_t size) { return space && alignment >= 64 && alignment <= PAGE && size; }

int posix_memalign(void **block, size_t alignment, size_t size) {
    *block = is_guarded_kind(alignment, size) ? guarded(alignment, size) : __libc_memalign(alignment, size);
    return *block ? 0 : ENOMEM;
}

void *aligned_alloc(size_t alignment, size_t size) {
    return is_guarded_kind(alignment, size) ? guarded(alignment, size) : __libc_memalign(alignment, size);
}

void free(void *block) {
    int error = errno; // free() keeps it
    is_guarded(block) ? release(block) : __libc_free(block);
    errno = error;
}

void *realloc(void *block, size_t size) {
    if (is_guarded(block)) end("guard pages: realloc of an aligned block\n");
    return __libc_realloc(block, size);
}
