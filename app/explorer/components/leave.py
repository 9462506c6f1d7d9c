"""Leads the browser to another page, after the reader has chosen something that is no link, such as a point."""

from urllib.parse import urlencode

from explorer.components.mount import component, packed

_mount = component("leave", '<div class="root"></div>')


def leave_for(page: str, parameters: dict[str, str]) -> None:
    """Follow the link to a page, which its path in `state` names, with one entry in the browser's history.

    `st.switch_page` would make two, of which one is the old page with the new parameters.
    """
    name = page.removeprefix("views/").removesuffix(".py")
    _mount(key="leave", data=packed({"address": f"{name}?{urlencode(parameters)}"}))
