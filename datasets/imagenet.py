"""ImageNet as two folders of 1000 class folders: DIR/train and DIR/val, or IMAGENET_TRAIN_ROOT and IMAGENET_VAL_ROOT.

(J. Deng et al., ImageNet: A Large-Scale Hierarchical Image Database, 2009.) Fewer classes are fine.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets.base import Options, Splits, existing_folder, given_folder
from datasets.imagefolder import from_folders

_REMEDY = (
    "give --data DIR with train/<class>/*.JPEG and val/<class>/*.JPEG in it, "
    "or set IMAGENET_TRAIN_ROOT and IMAGENET_VAL_ROOT"
)


def load(options: Options) -> Splits:
    """Images of 224 pixels unless asked otherwise; no validation, and a line saying so, without a folder for it."""
    train, val = _folders(options)
    if val is None and options.validation:
        options.warn(f"imagenet: no validation folder beside {train}; training goes on without validation")
    return from_folders(train, val, replace(options, image_size=options.image_size or 224))


def _folders(options: Options) -> tuple[Path, Path | None]:
    if options.data_dir is not None:
        folder = given_folder(options.data_dir, what="imagenet", remedy=_REMEDY)
        train = existing_folder(folder / "train", what="imagenet", remedy=_REMEDY)
        return train, folder / "val" if (folder / "val").is_dir() else None
    train_root, val_root = (options.environment.get(f"IMAGENET_{part}_ROOT") for part in ("TRAIN", "VAL"))
    train = given_folder(Path(train_root) if train_root else None, what="imagenet", remedy=_REMEDY)
    if not val_root:
        return train, None
    return train, existing_folder(Path(val_root).expanduser(), what="IMAGENET_VAL_ROOT", remedy=_REMEDY)
