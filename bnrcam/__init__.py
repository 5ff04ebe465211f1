__version__ = "0.1.0"

# the only file here that is not exported from a notebook: the import registers the Conformers with timm
from bnrcam import conformer as _conformer
