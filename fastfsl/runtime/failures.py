"""Errors that outlive the call they come from."""

from __future__ import annotations

import traceback


def forget_locals(error: BaseException) -> None:
    """Empty the frames that an error passed, and those of its causes, but keep the lines that they were at.

    An error that is kept, or that a frame refers to itself, would keep the images of its batch: for as long, or until
    the garbage collector runs. Frames that are still running are left as they are.
    """
    link: BaseException | None = error
    seen = set[int]()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        traceback.clear_frames(link.__traceback__)
        link = link.__cause__ or link.__context__
