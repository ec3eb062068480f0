"""The content-addressed store: what has been built, found again by what determined it."""

from furiosa_build.store.actions import ActionRecord, Made, Output, Store, default_store_root

__all__ = ["ActionRecord", "Made", "Output", "Store", "default_store_root"]
