"""Images that are there twice: under two names, or in both splits."""

from __future__ import annotations

from moee.data.folders.walk import Inode, Listing
from moee.errors import UserError


def without_doubles(listing: Listing) -> tuple[Listing, list[str]]:
    """The listing with every real file once, and the second names that were dropped."""
    seen: set[Inode] = set()
    kept: list[tuple[str, Inode | None]] = []
    doubles = []
    for path, inode in listing.images:
        if inode is not None and inode in seen:
            doubles.append(path)
            continue
        kept.append((path, inode))
        if inode is not None:
            seen.add(inode)
    return Listing(listing.root, kept, listing.folders), doubles


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
