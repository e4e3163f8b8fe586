"""Images that are there twice: under two names, or in both splits."""

from __future__ import annotations

import os
from collections.abc import Sequence

from moee.data.class_names import listed
from moee.data.folders.walk import Inode, Listing, inode_of
from moee.errors import UserError


def without_doubles(listing: Listing) -> tuple[Listing, list[str]]:
    """The listing with every real file once, and the second names that were dropped. A link never takes a file from its own
    place, so its folder says of which class it is; of equal names the first one stays."""
    names: dict[Inode, list[str]] = {}
    for path, inode in listing.images:
        if inode is not None:
            names.setdefault(inode, []).append(path)
    dropped: set[str] = set()
    for paths in names.values():
        if len(paths) > 1:
            own = next((path for path in paths if not os.path.islink(os.path.join(listing.root, path))), paths[0])
            dropped |= {path for path in paths if path != own}
    kept = [image for image in listing.images if image[0] not in dropped]
    return Listing(listing.root, kept, listing.folders), [path for path, _ in listing.images if path in dropped]


def said_of_doubles(doubles: Sequence[str], listing: Listing) -> str:
    """A sentence about the second names that were dropped from a listing; names in folders of other classes are told."""
    places = {inode: os.path.dirname(path) for path, inode in listing.images}
    other = [p for p in doubles if places.get(inode_of(os.stat(os.path.join(listing.root, p)))) != os.path.dirname(p)]
    said = f"{count_images(len(doubles))} under a second name {'was' if len(doubles) == 1 else 'were'} left out"
    more = f"; {count_images(len(other))} of them in another folder, which may be of another class" if other else ""
    return f"{said} ({listed(list(doubles), False)}){more}"


def take_apart(source: str, listings: dict[str, Listing]) -> list[str]:
    """Take from train what val holds too, so that nothing held out is trained on; a sentence if there was any. Raises
    `UserError` where nothing would be left to train on."""
    train, val = listings["train"], listings["val"]
    held_out = {inode for _, inode in val.images if inode is not None}
    kept = [image for image in train.images if image[1] is None or image[1] not in held_out]
    both = len(train.images) - len(kept)
    if not both:
        return []
    if not kept:
        raise UserError(f"data {source!r}: every image of {train.root} is in {val.root} too; give val images of its own, or "
                        f"remove it and a fifth is held out")  # fmt: skip
    train.images = kept
    return [f"{count_images(both)} in both train and val, under whatever name, {'is' if both == 1 else 'are'} not trained on"]


def count_images(count: int) -> str:
    """A number of images in words."""
    return f"{count} image" if count == 1 else f"{count} images"
