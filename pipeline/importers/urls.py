"""The one document_id of a web page, however the link to it was written; None for what is no web page.

RFC 3986's and IDNA's rules (case, default ports, dot segments, percent-encoding, international hosts) are
url-normalize's: w3lib's canonicalize_url also sorts the query and follows IDNA 2003, which makes faß.de and
fass.de one host. What is added here says which parts of an address name no other page.
"""

from functools import lru_cache
from ipaddress import ip_address
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from url_normalize import url_normalize

# Names the click or the campaign, never the page: Google, Meta, Microsoft, Twitter, TikTok, LinkedIn, Yandex,
# Mailchimp, HubSpot, Marketo, Vero. A word like `ref` or `source` is a page's own on other sites.
TRACKING = {
    "_hsenc", "_hsmi", "dclid", "fbclid", "gbraid", "gclid", "gclsrc", "igshid", "li_fat_id", "mc_cid",
    "mc_eid", "mkt_tok", "msclkid", "ttclid", "twclid", "vero_id", "wbraid", "yclid",
}  # fmt: skip


@lru_cache(maxsize=65_536)  # 50 µs an address; a server log names the same few for millions of lines
def document_id(url: str) -> str | None:
    """The address that all readers of one page share.

    Dropped: the fragment, tracking parameters, and a name and password before the host, which must not
    become public. http and https, and a host with and without www., stay apart: they may be two pages.

    Returns:
        An http or https address, or None: another scheme (chrome:, file:, about:, mailto:), an address
        that cannot be one, or this computer's own (localhost is another page for every reader).
    """
    try:
        parts = urlsplit(url.strip())
        if parts.scheme not in ("http", "https") or not _is_shared(parts.hostname or ""):
            return None
        return url_normalize(urlunsplit((parts.scheme, _host(parts), parts.path, _query(parts.query), "")))
    except ValueError:  # a port out of range, half an IPv6 address, a label IDNA has no form for
        return None


def _host(parts: SplitResult) -> str:
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    return host if parts.port is None else f"{host}:{parts.port}"


def _query(query: str) -> str:
    """Without tracking; the rest as it was, for a site may care about order and repetition."""
    return "&".join(part for part in query.split("&") if not _is_tracking(part))


def _is_tracking(parameter: str) -> bool:
    name = unquote(parameter.partition("=")[0]).lower()
    return name.startswith("utm_") or name in TRACKING


def _is_shared(host: str) -> bool:
    if not host or " " in host or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ip_address(host).is_loopback
    except ValueError:  # a name
        return True
