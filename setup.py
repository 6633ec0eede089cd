"""Package metadata. `pip install -e '.[test]'` installs everything `make test` needs."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="rsengine",
    version="0.1.0",
    description="A performance-optimised training engine for ResNet-RS on CIFAR-sized images",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    # rsengine/kernels and rsengine/data are links to the top-level packages, so the walk below finds them too.
    packages=find_packages(include=["rsengine", "rsengine.*"]),
    package_data={"rsengine": ["py.typed", "recipes/*.toml"], "rsengine.kernels.native": ["*.c", "*.h"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "triton>=3.6; platform_system == 'Linux'",
        "ffcv==1.0.2",
        "numba>=0.60",
        "numpy>=1.26",
        "setuptools",  # ffcv imports distutils, which Python 3.12 and later no longer carry
        "matplotlib>=3.8",
        "pillow>=10",
        "psutil>=5.9",
        "safetensors>=0.4",
        "scikit-learn>=1.4",
        "tomli-w>=1",
        "tqdm>=4.66",
    ],
    extras_require={
        "parquet": ["pyarrow>=14"],
        "test": [
            "hypothesis>=6.100",
            "pyarrow>=14",
            "pytest>=8",
            "pytest-benchmark>=4",
            "pytest-xdist>=3.8",
            "ruff>=0.6",
            "timm>=1.0.9",
        ],
    },
)
