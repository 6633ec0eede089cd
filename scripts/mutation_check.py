"""Plant faults in the kernels, one at a time, and see that a test catches each: `scripts/mutation_check.py [WORD ...]`

Each fault is planted in a copy of the repository, and the op's tests are run there in Triton's interpreter (the offline
compiler's, where a fault slows a kernel and does not falsify it). Words select the faults whose line holds one of them.
Takes a few minutes; exits 1 if a fault survives, or if its place is no longer in the code.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SE, CE, EMA, TABLE = (
    f"kernels/jit/{name}.py" for name in ("squeeze_excite_kernels", "cross_entropy_kernels", "ema_kernels", "ema_table")
)
AUGMENT = "kernels/jit/augment_kernels.py"
AUGMENT_TESTS = "tests/kernels/jit/test_augment.py"
SE_TESTS, CE_TESTS, EMA_TESTS = (
    f"tests/kernels/jit/test_{name}.py" for name in ("squeeze_excite", "cross_entropy", "ema")
)
COMPILE_TESTS = "tests/kernels/proof/test_compile.py"
BN, PASSES = "kernels/batch_normalization.py", "kernels/native/passes.h"
BN_TESTS = "tests/kernels/test_batch_normalization.py"
# Skipped where the processor cannot run what they test.
CONVOLUTION_TESTS, BOTTLENECK_TESTS = "tests/kernels/test_convolutions.py", "tests/kernels/test_bottleneck.py"

# By file and the tests that must notice: what is wrong, the code as it is, the faulty code.
FAULTS = {
    (PASSES, BN_TESTS): [
        (
            "batch norm: blocks of rows are not joined",
            "my_squares[c] += squares[c] + d * d * weight",
            "my_squares[c] += squares[c]",
        ),
        ("batch norm: threads are not joined", "their_squares[c] + d * d * weight", "their_squares[c]"),
        ("batch norm: the shortcut's gradient passes the ReLU", "STORE(g);", "STORE(LOAD(g_row[c]));"),
    ],
    ("kernels/native/passes.c", BN_TESTS): [
        ("batch norm: bfloat16 by truncation", "bits + 0x7fff + ((bits >> 16) & 1)", "bits"),
    ],
    ("kernels/native/convolution_forward.c", CONVOLUTION_TESTS): [
        (
            "convolution: the statistics of blocks are not joined",
            "_mm512_fmadd_ps(_mm512_mul_ps(low, low), weight, squares.low)",
            "squares.low",
        ),
        ("convolution: those of threads are not joined", "their_squares[j] + d * d * weight", "their_squares[j]"),
    ],
    ("kernels/native/plan.h", CONVOLUTION_TESTS): [
        (
            "convolution: what is read is not rectified",
            "v.low = relu(_mm512_fmadd_ps(v.low, a.low, b.low))",
            "v.low = _mm512_fmadd_ps(v.low, a.low, b.low)",
        ),
        ("convolution: the variance has no gradient", "_mm512_fmadd_ps(a.low, slope.low, offset.low)", "offset.low"),
        (
            "convolution: the gradient passes the ReLU after it",
            "mask & d->bits[(row + r) * words + c / SIDE]",
            "mask",
        ),
    ],
    ("kernels/native/convolution_backward.c", CONVOLUTION_TESTS): [
        ("convolution: a chunk that is not full adds the one before", "if (n < p.together) {", "if (0) {"),
        ("convolution: the sum is not about the mean", "_mm512_sub_ps(x.low, mean.low)", "x.low"),
        (
            "convolution: the shortcut's gradient is not shared out",
            "_mm512_fmadd_ps(more.low, factor, v.low)",
            "_mm512_add_ps(more.low, v.low)",
        ),
    ],
    ("kernels/native/weight_gradient.h", CONVOLUTION_TESTS): [
        ("convolution: sums begin with the last call's", "begun >> c.tap[t] & 1", "1"),
    ],
    ("kernels/native/gate.c", BOTTLENECK_TESTS): [
        ("gate: the sigmoid's derivative lacks a factor", "* opened[c] * (1.0f - opened[c])", "* opened[c]"),
        ("gate: the squeeze's gradient is not divided by the pixels", "* inverse * scale[c]", "* scale[c]"),
        ("gate: stochastic depth does not reach the excited", "* kept * opened[c] * (1", "* opened[c] * (1"),
        ("gate: the squeeze has no part in the batch norm's sums", "q[c] += g * p[c] + m * x[c]", "q[c] += g * p[c]"),
    ],
    ("kernels/native/update.c", "tests/kernels/test_native_update.py"): [
        ("update: weights do not decay", "? g[i] + decay * p[i] :", "? g[i] :"),
        ("update: Nesterov's momentum is plain", "nesterov ? slope + momentum * velocity : velocity", "velocity"),
        ("update: the last elements are no thread's", "total * (me + 1) / team", "total / team * (me + 1)"),
        ("update: an average that should be the weights is nearly so", "share < 0.5f ?", "share <= 1.0f ?"),
    ],
    ("kernels/native/residual.c", CONVOLUTION_TESTS): [
        (
            "convolution: the shortcut's batch norm is left out",
            "s.low = _mm512_fmadd_ps(s.low, p.low, q.low);",
            "",
        ),
        ("convolution: an image's sum is not about the mean", "_mm512_sub_ps(v.low, m.low)", "v.low"),
        ("convolution: nor is the shortcut's", "_mm512_sub_ps(s.low, sm.low)", "s.low"),
    ],
    (BN, BN_TESTS): [("batch norm: the running variance is biased", "variance * (rows / (rows - 1))", "variance")],
    ("kernels/block_epilogue.py", BN_TESTS): [
        ("batch norm: the squeeze has no gradient", "(dsqueezed / pixels - sums / rows)", "(-sums / rows)"),
        ("batch norm: the gate's scale is left out of its sum", "(dsqueezed, kept, total)", "(dsqueezed, gate, total)"),
    ],
    (AUGMENT, AUGMENT_TESTS): [
        ("flip draws anew where it alternates", "tl.full((), 0, tl.uint32), _FLIP", "period, _FLIP"),
        ("equalize counts the padding", "tl.histogram(value, 256, mask=mask)", "tl.histogram(value, 256)"),
        ("Cutout's second hole is its first", "w0, w1 = w2, w3", "w0, w1 = w0, w1"),
        ("contrast's mean is not rounded", "0) + PIXELS) // (2 * PIXELS)", "0)) // (2 * PIXELS)"),
        ("sharpness touches the border", "(x > 0) & (x < WIDTH - 1) & (y > 0)", "(x < WIDTH - 1) & (y > 0)"),
        ("bilinear reads a row too low", "+ 1 < HEIGHT, top", "< HEIGHT, top"),
    ],
    (SE, SE_TESTS): [
        ("mean is a sum", "tl.sum(x.to(tl.float32), axis=1) / PIXELS", "tl.sum(x.to(tl.float32), axis=1)"),
        (
            "mask lets the pixels of the next sample in",
            "& (offs_p < PIXELS)[None, :, None]",
            "& (offs_p < BLOCK_P)[None, :, None]",
        ),
        ("depth of a product is not masked", "mask_k = offs_k < DEPTH", "mask_k = offs_k < DEPTH + BLOCK_K"),
        ("program writes a sample of the next one", "mask_m = offs_m < m_end", "mask_m = offs_m <= m_end"),
        (
            "no barrier between a product's store and its loads",
            "    tl.debug_barrier()\n    for o_start",
            "    for o_start",
        ),
        (
            "gradient of the mean is not divided by the pixels",
            "offs_nc, mask=mask_nc, other=0.0) / PIXELS",
            "offs_nc, mask=mask_nc, other=0.0)",
        ),
        ("derivative of the sigmoid lacks a factor", "dz2 = dgate * gate * (1.0 - gate)", "dz2 = dgate * gate"),
        ("ReLU passes the gradient at 0", ".to(tl.float32) <= 0.0, 0.0, g)", ".to(tl.float32) < 0.0, 0.0, g)"),
        ("ReLU hides NaN", "tl.where(x < 0.0, 0.0, x)", "tl.where(x > 0.0, x, 0.0)"),
        (
            "two-pass reduction skips the last pixels",
            "range(0, PIXELS, BLOCK_P)",
            "range(0, PIXELS // BLOCK_P * BLOCK_P, BLOCK_P)",
        ),
        (
            "bias gradient keeps only the last samples",
            "sum_r += tl.sum(r.to(tl.float32), axis=0)",
            "sum_r = tl.sum(r.to(tl.float32), axis=0)",
        ),
    ],
    (CE, CE_TESTS): [
        ("smoothing term is missing", "            qz += uniform * z\n", "            qz += 0.0 * z\n"),
        ("smoothed target is not subtracted in the gradient", "confidence, 0.0) + uniform", "confidence, 0.0)"),
        ("gradient is not scaled", "tl.where(is_valid, gradient_scale, float", "tl.where(is_valid, 1.0, float"),
        ("online sum is not moved to the new maximum", "total * tl.exp(row_max - new_shift) +", "total +"),
        (
            "ties count the last maximum",
            "tl.min(tl.where(x == row_max[:, None], offs_c, CLASSES)",
            "tl.max(tl.where(x == row_max[:, None], offs_c, -1)",
        ),
        ("label one past the last class is valid", "& (index < CLASSES)", "& (index <= CLASSES)"),
        ("rows past the batch are read", "mask_m = offs_m < n_rows - row", "mask_m = offs_m <= n_rows - row"),
    ],
    (EMA, EMA_TESTS): [
        (
            "momentum and gradient change places",
            "step + momentum * m if IS_NESTEROV",
            "momentum * step + m if IS_NESTEROV",
        ),
        ("weight decay is missing", ".to(tl.float32) + weight_decay * p", ".to(tl.float32)"),
        (
            "the EMA takes the parameter before rounding",
            "p = (p - lr * step).to(p_ptrs.dtype.element_ty)\n    tl.store(p_ptrs, p,",
            "p = p - lr * step\n    tl.store(p_ptrs, p.to(p_ptrs.dtype.element_ty),",
        ),
        ("tail ends one element early", "s_offs, offs_piece < count, decay)", "s_offs, offs_piece < count - 1, decay)"),
        ("decay is taken for its complement", "weight = 1.0 - decay\n", "weight = decay\n"),
    ],
    (TABLE, EMA_TESTS): [
        ("chunks of a tensor overlap", "layout == LINEAR, first, 0)", "layout == LINEAR, first - first % 4096, 0)"),
    ],
    (EMA, COMPILE_TESTS): [
        (
            "aligned chunks are not declared so",
            "tl.multiple_of(p.to(P_TYPE), 16) + offs\n        g",
            "p.to(P_TYPE) + offs\n        g",
        ),
    ],
    ("kernels/jit/statistics_kernels.py", "tests/kernels/jit/test_batch_norm.py"): [
        (
            "statistics: lanes and parts are not joined",
            "tl.sum(squares + count * d * d, axis=0)",
            "tl.sum(squares, axis=0)",
        ),
        (
            "statistics: squares of the values are summed",
            "rough = tl.sum(count * mean, axis=0) / total",
            "rough = tl.sum(count * mean, axis=0) * 0.0",
        ),
        (
            "statistics: parts beyond the first step are not joined",
            "their_squares + d * d * (merged * theirs / (merged + theirs))",
            "their_squares",
        ),
        ("statistics: the last part counts as a whole one", "rows - (parts - 1) * part_rows, 0)", "part_rows, 0)"),
        (
            "statistics: a lane's mean moves by the same share each time",
            "(1.0 / (i // BLOCK_M + 1))",
            "(1.0 / (i // BLOCK_M * 0 + 1))",
        ),
        (
            "statistics: rows of the next split are read",
            "mask = (offs_m < size - i)[:, None]",
            "mask = (offs_m < BLOCK_M)[:, None]",
        ),
        ("statistics: the sums of later parts are left out", "acc += tl.load(sums_ptr", "acc = tl.load(sums_ptr"),
        ("statistics: the running variance is biased", "squares / (rows - 1)", "squares / rows"),
    ],
    ("kernels/jit/batch_norm_kernels.py", "tests/kernels/jit/test_batch_norm.py"): [
        ("normalise: ReLU hides NaN", "tl.where(y < 0.0, 0.0, y)", "tl.where(y > 0.0, y, 0.0)"),
        ("normalise: ReLU passes the gradient at 0", "<= 0.0, 0.0, g)", "< 0.0, 0.0, g)"),
        ("normalise: every split moves the buffers", "if split == 0:", "if split >= 0:"),
        (
            "normalise: rows of the next split are written",
            "mask = (offs_m < size - last + i)[:, None]",
            "mask = (offs_m < BLOCK_M)[:, None]",
        ),
        ("normalise: the steps back skip rows", "(size - 1) // BLOCK_M * BLOCK_M", "size // BLOCK_M * BLOCK_M"),
        (
            "normalise: rows are summed without their split's start",
            "first = start.to(tl.int64) * CHANNELS",
            "first = start.to(tl.int64) * 0",
        ),
        (
            "normalise: the gradient's mean is left in",
            "constant = -scale * total / rows",
            "constant = -scale * total * 0.0",
        ),
        (
            "normalise: the weight's gradient is not divided by the deviation",
            "product * deviation, mask=mask_c",
            "product, mask=mask_c",
        ),
    ],
    ("kernels/jit/batch_norm.py", "tests/kernels/proof/test_compile.py"): [
        (
            "normalise: a program takes less of a row than a vector",
            "LINE_BYTES = 16, 32, 128",
            "LINE_BYTES = 8, 8, 128",
        ),
    ],
    ("kernels/jit/block_epilogue_kernels.py", "tests/kernels/jit/test_block_epilogue.py"): [
        (
            "block epilogue: the last split has images past the batch",
            "tl.minimum((split + 1) * images, n)",
            "(split + 1) * images",
        ),
        ("block epilogue: tiles of a split are not joined", "+ delta * delta * (count * share)", "+ 0.0 * delta"),
        ("block epilogue: an image's mean is of its last tile", "* (pixels / (p + pixels))", "* 1.0"),
        (
            "block epilogue: the squeezed maps are not normalised",
            "squeezed = centred * scale[None, :]",
            "squeezed = centred",
        ),
        (
            "block epilogue: the gate's gradient lacks stochastic depth",
            "dlogit *= _keep(keep_ptr, offs_n, n_end)",
            "dlogit *= 1.0",
        ),
        ("block epilogue: the sigmoid's derivative lacks a factor", "* gate * (1.0 - gate)", "* gate"),
        (
            "block epilogue: the squeeze's gradient is not divided by the pixels",
            "dsqueezed / PIXELS - dbias",
            "dsqueezed - dbias",
        ),
        ("block epilogue: the variance has no gradient", " - x * slope[None, None, :]", ""),
        ("block epilogue: the bias has none of the squeeze", "kept * total + dsqueezed", "kept * total"),
        ("block epilogue: the scale has none of the squeeze", "kept * product + dsqueezed * centred", "kept * product"),
        ("block epilogue: a program goes on into the next one's images", "tl.minimum(n_start + IMAGES, n)", "n"),
        ("block epilogue: the last pixels' tile is not masked", "(offs_p < PIXELS)", "(offs_p >= 0)"),
    ],
    ("kernels/jit/block_epilogue.py", "tests/kernels/jit/test_block_epilogue.py"): [
        ("block epilogue: the library's hidden layer is not rectified", "torch._addmm_activation(b1", "torch.addmm(b1"),
        (
            "block epilogue: autocast reaches the library's products",
            "torch.autocast(x.device.type, enabled=False)",
            "torch.autocast(x.device.type, enabled=torch.is_autocast_enabled(x.device.type))",
        ),
        (
            "block epilogue: a strided keep_scale is read as if it were not",
            "keep_scale = None if keep_scale is None else keep_scale.contiguous()",
            "keep_scale = keep_scale",
        ),
    ],
}


def main(words: list[str]) -> int:
    faults = [(*fault, *place) for place, faults in FAULTS.items() for fault in faults]
    chosen = [fault for fault in faults if not words or any(word in fault[0] for word in words)]
    survivors = 0
    for i, (what, old, new, file, tests) in enumerate(chosen, 1):
        verdict = plant_and_test(file, old, new, tests)
        survivors += verdict.startswith("NOT CAUGHT")
        print(f"{i}/{len(chosen)} {what} ({file}): {verdict}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} faults caught")
    return 1 if survivors else 0


def plant_and_test(file: str, old: str, new: str, tests: str) -> str:
    """What became of one fault: ``caught by TEST: ERROR`` or ``NOT CAUGHT …``."""
    text = (ROOT / file).read_text()
    if old not in text:
        return f"NOT CAUGHT: {old!r} is no longer in the file"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("kernels", "data", "rsengine", "tests", "pyproject.toml"):
            source = ROOT / name
            ignore = shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
            else:
                shutil.copy(source, copy / name)
        (copy / file).write_text(text.replace(old, new))
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["OMP_NUM_THREADS"] = "1"
        select = ["-k", "sm_90"]
        if tests != COMPILE_TESTS:
            environment["TRITON_INTERPRET"], select = "1", []
        command = [sys.executable, "-m", "pytest", tests, "-x", "-q", "--tb=short", "-p", "no:cacheprovider", *select]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    failed = re.search(r"^FAILED \S+?::(.+)$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and failed:
        return f"caught by {failed[1]}"
    return f"NOT CAUGHT (pytest ended with status {done.returncode}): {done.stdout.strip().splitlines()[-1:]}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
