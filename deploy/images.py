"""Which digest stands behind each image of the manifests."""

import re
from typing import Final

from deploy.rendering import KUSTOMIZE

FILE: Final = KUSTOMIZE / "components" / "images" / "kustomization.yaml"
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


def pinned(text: str, name: str, digest: str) -> str:
    """Return the component of images with one of them named by digest.

    Args:
        text: The component.
        name: The short name of the manifests, such as kimberly.
        digest: Such as sha256:….

    Raises:
        ValueError: It is no digest, or there is no such image.
    """
    if not _DIGEST.fullmatch(digest):
        raise ValueError(f"{digest!r} is no digest")
    entry = re.compile(rf"(- name: {re.escape(name)}\n  newName: \S+\n)  \w+: \S+\n")
    changed, count = entry.subn(rf"\1  digest: {digest}\n", text)
    if count != 1:
        raise ValueError(f"there is no image {name!r}")
    return changed
