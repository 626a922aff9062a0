"""Triton's interpreter before 3.7 beside numpy since 2.4: bounds of loops are arrays of one element, which numpy no
longer takes for numbers (triton-lang/triton issue 9171)."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version


def mend() -> None:
    """Lets loops of kernels run in an interpreter that cannot read their bounds; leaves any other as it is."""
    if Version(version("triton")) >= Version("3.7") or Version(version("numpy")) < Version("2.4"):
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_with_index
