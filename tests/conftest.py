"""Every test runs with the shapes of public signatures checked (jaxtyping + beartype)."""

from jaxtyping import install_import_hook

install_import_hook("dino", "beartype.beartype")
