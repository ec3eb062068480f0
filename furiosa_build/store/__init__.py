"""The content-addressed store: what has been built, found again by what determined it."""

from furiosa_build.store.actions import ActionResult, Store, default_store_root
from furiosa_build.store.records import ActionRecord, Outcome, Output

__all__ = ["ActionRecord", "ActionResult", "Outcome", "Output", "Store", "default_store_root"]
