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
EPILOGUE = "kernels/block_epilogue.py"
BN_TESTS = "tests/kernels/test_batch_normalization.py"

# (what is wrong, file, the code as it is, the faulty code, the tests that must notice)
FAULTS = [
    (
        "batch norm: blocks of rows are not joined",
        PASSES,
        "my_squares[c] += squares[c] + d * d * weight",
        "my_squares[c] += squares[c]",
        BN_TESTS,
    ),
    (
        "batch norm: threads are not joined",
        PASSES,
        "their_squares[c] + d * d * weight",
        "their_squares[c]",
        BN_TESTS,
    ),
    (
        "batch norm: bfloat16 by truncation",
        "kernels/native/passes.c",
        "bits + 0x7fff + ((bits >> 16) & 1)",
        "bits",
        BN_TESTS,
    ),
    ("batch norm: the shortcut's gradient passes the ReLU", PASSES, "STORE(g);", "STORE(LOAD(g_row[c]));", BN_TESTS),
    (
        "batch norm: the squeeze has no gradient",
        EPILOGUE,
        "(dsqueezed / pixels - sums / rows)",
        "(-sums / rows)",
        BN_TESTS,
    ),
    ("batch norm: the running variance is biased", BN, "variance * (rows / (rows - 1))", "variance", BN_TESTS),
    (
        "batch norm: the gate's scale is left out of its sum",
        EPILOGUE,
        "(dsqueezed, kept, total)",
        "(dsqueezed, gate, total)",
        BN_TESTS,
    ),
    (
        "flip draws anew where it alternates",
        AUGMENT,
        "tl.full((), 0, tl.uint32), _FLIP",
        "period, _FLIP",
        AUGMENT_TESTS,
    ),
    (
        "equalize counts the padding",
        AUGMENT,
        "tl.histogram(value, 256, mask=mask)",
        "tl.histogram(value, 256)",
        AUGMENT_TESTS,
    ),
    ("Cutout's second hole is its first", AUGMENT, "w0, w1 = w2, w3", "w0, w1 = w0, w1", AUGMENT_TESTS),
    ("contrast's mean is not rounded", AUGMENT, "0) + PIXELS) // (2 * PIXELS)", "0)) // (2 * PIXELS)", AUGMENT_TESTS),
    (
        "sharpness touches the border",
        AUGMENT,
        "(x > 0) & (x < WIDTH - 1) & (y > 0)",
        "(x < WIDTH - 1) & (y > 0)",
        AUGMENT_TESTS,
    ),
    ("bilinear reads a row too low", AUGMENT, "+ 1 < HEIGHT, top", "< HEIGHT, top", AUGMENT_TESTS),
    ("mean is a sum", SE, "tl.sum(x.to(tl.float32), axis=1) / PIXELS", "tl.sum(x.to(tl.float32), axis=1)", SE_TESTS),
    (
        "mask lets the pixels of the next sample in",
        SE,
        "& (offs_p < PIXELS)[None, :, None]",
        "& (offs_p < BLOCK_P)[None, :, None]",
        SE_TESTS,
    ),
    ("depth of a product is not masked", SE, "mask_k = offs_k < DEPTH", "mask_k = offs_k < DEPTH + BLOCK_K", SE_TESTS),
    ("program writes a sample of the next one", SE, "mask_m = offs_m < m_end", "mask_m = offs_m <= m_end", SE_TESTS),
    (
        "no barrier between a product's store and its loads",
        SE,
        "    tl.debug_barrier()\n    for o_start",
        "    for o_start",
        SE_TESTS,
    ),
    (
        "gradient of the mean is not divided by the pixels",
        SE,
        "offs_nc, mask=mask_nc, other=0.0) / PIXELS",
        "offs_nc, mask=mask_nc, other=0.0)",
        SE_TESTS,
    ),
    (
        "derivative of the sigmoid lacks a factor",
        SE,
        "dz2 = dgate * gate * (1.0 - gate)",
        "dz2 = dgate * gate",
        SE_TESTS,
    ),
    (
        "ReLU passes the gradient at 0",
        SE,
        ".to(tl.float32) <= 0.0, 0.0, g)",
        ".to(tl.float32) < 0.0, 0.0, g)",
        SE_TESTS,
    ),
    ("ReLU hides NaN", SE, "tl.where(x < 0.0, 0.0, x)", "tl.where(x > 0.0, x, 0.0)", SE_TESTS),
    (
        "two-pass reduction skips the last pixels",
        SE,
        "range(0, PIXELS, BLOCK_P)",
        "range(0, PIXELS // BLOCK_P * BLOCK_P, BLOCK_P)",
        SE_TESTS,
    ),
    (
        "bias gradient keeps only the last samples",
        SE,
        "sum_r += tl.sum(r.to(tl.float32), axis=0)",
        "sum_r = tl.sum(r.to(tl.float32), axis=0)",
        SE_TESTS,
    ),
    ("smoothing term is missing", CE, "            qz += uniform * z\n", "            qz += 0.0 * z\n", CE_TESTS),
    (
        "smoothed target is not subtracted in the gradient",
        CE,
        "confidence, 0.0) + uniform",
        "confidence, 0.0)",
        CE_TESTS,
    ),
    (
        "gradient is not scaled",
        CE,
        "tl.where(is_valid, gradient_scale, float",
        "tl.where(is_valid, 1.0, float",
        CE_TESTS,
    ),
    ("online sum is not moved to the new maximum", CE, "total * tl.exp(row_max - new_shift) +", "total +", CE_TESTS),
    (
        "ties count the last maximum",
        CE,
        "tl.min(tl.where(x == row_max[:, None], offs_c, CLASSES)",
        "tl.max(tl.where(x == row_max[:, None], offs_c, -1)",
        CE_TESTS,
    ),
    ("label one past the last class is valid", CE, "& (index < CLASSES)", "& (index <= CLASSES)", CE_TESTS),
    ("rows past the batch are read", CE, "mask_m = offs_m < n_rows - row", "mask_m = offs_m <= n_rows - row", CE_TESTS),
    (
        "momentum and gradient change places",
        EMA,
        "step + momentum * m if IS_NESTEROV",
        "momentum * step + m if IS_NESTEROV",
        EMA_TESTS,
    ),
    ("weight decay is missing", EMA, ".to(tl.float32) + weight_decay * p", ".to(tl.float32)", EMA_TESTS),
    (
        "the EMA takes the parameter before rounding",
        EMA,
        "p = (p - lr * step).to(p_ptrs.dtype.element_ty)\n    tl.store(p_ptrs, p,",
        "p = p - lr * step\n    tl.store(p_ptrs, p.to(p_ptrs.dtype.element_ty),",
        EMA_TESTS,
    ),
    (
        "tail ends one element early",
        EMA,
        "s_offs, offs_piece < count, decay)",
        "s_offs, offs_piece < count - 1, decay)",
        EMA_TESTS,
    ),
    ("decay is taken for its complement", EMA, "weight = 1.0 - decay\n", "weight = decay\n", EMA_TESTS),
    (
        "chunks of a tensor overlap",
        TABLE,
        "layout == LINEAR, first, 0)",
        "layout == LINEAR, first - first % 4096, 0)",
        EMA_TESTS,
    ),
    (
        "aligned chunks are not declared so",
        EMA,
        "tl.multiple_of(p.to(P_TYPE), 16) + offs\n        g",
        "p.to(P_TYPE) + offs\n        g",
        COMPILE_TESTS,
    ),
]


def main(words: list[str]) -> int:
    chosen = [fault for fault in FAULTS if not words or any(word in fault[0] for word in words)]
    survivors = 0
    for i, (what, file, old, new, tests) in enumerate(chosen, 1):
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
