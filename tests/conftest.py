"""Every test runs with the shapes of public signatures checked (jaxtyping + beartype)."""

import signal

from jaxtyping import install_import_hook

install_import_hook("dino", "beartype.beartype")

# Tests send themselves Ctrl-C. What a shell starts in the background ignores it, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
