"""The content-addressed store: what has been built, found again by what determined it."""

from furiosa_build.store.actions import Made, Store, default_store_root
from furiosa_build.store.records import ActionRecord, Output

__all__ = ["ActionRecord", "Made", "Output", "Store", "default_store_root"]
