"""GPU kernels of spear_fast, imported as `spear_fast.kernels`; a leaf that needs torch and triton only."""

if __name__ != "spear_fast.kernels":
    raise ImportError(
        "This folder is spear_fast's package of kernels and is not imported by its own name: "
        "install the project (pip install -e .) and use `import spear_fast.kernels`."
    )
