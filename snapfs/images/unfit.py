"""Why an image or a layer can't be taken."""

from __future__ import annotations


class Unfit(Exception):
    """What was given is no image, or no layer, that can be unpacked: ``str`` is a sentence without its end, which goes on from
    what it is about ("a layer: it is cut off")."""


class Elsewhere(Unfit):
    """It is whole, but not for this machine."""
