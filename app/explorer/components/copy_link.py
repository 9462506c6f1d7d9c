"""A button that copies the address of the page, which has all of its state."""

from explorer.components.mount import component

_mount = component("copy_link", '<div class="root"><button>Copy link</button></div>')


def draw_copy_link() -> None:
    """Draw the button."""
    _mount(key="copy-link", width="content")
