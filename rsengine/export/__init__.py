"""What a run has learned, in formats that others load: :func:`export` writes, :func:`load_classifier` reads them."""

from rsengine.export.classifier import Classifier
from rsengine.export.formats import FORMATS, export
from rsengine.export.read import load_classifier

__all__ = ["FORMATS", "Classifier", "export", "load_classifier"]
