"""Data sets of any form, converted once to .beton files and checked.

`find_dataset` is what training calls: it finds a data set, converts it where needed and returns its description.
`convert` does one conversion, `load_dataset` reads the description of a converted one,
and `identity_of` tells it from all others. Importing this package imports none of FFCV, torch, torchvision, pyarrow and
scikit-learn.
"""

from rsengine.data.convert import convert
from rsengine.data.dataset import Dataset, identity_of, load_dataset
from rsengine.data.errors import DataError
from rsengine.data.find import find_dataset

__all__ = ["DataError", "Dataset", "convert", "find_dataset", "identity_of", "load_dataset"]
