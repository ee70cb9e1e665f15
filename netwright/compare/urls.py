"""Storages as they are named: paths and database URLs, whose passwords are shown nowhere."""

import re
from pathlib import Path
from urllib.parse import unquote

from netwright.errors import UnreachableStorage

_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+_.-]*)://(?:(?P<user>[^:@/?#\s]*)(?::(?P<password>[^@/?#\s]*))?@)?"
    r"(?P<host>[A-Za-z0-9._-]*|\[[0-9A-Fa-f:.%]+\])(?::(?P<port>\d+))?"
    r"(?:/(?P<database>[^?#@:\s]*))?(?:\?(?P<query>[^#\s]*))?")
_FILE = re.compile(r"sqlite(?:\+pysqlite)?://[^@]*")  # a file's, which has no password
_MISTYPED = re.compile(
    r"(?i)\s*(?:(?:postgres|postgresql|mysql|mariadb|oracle|mssql|redis|cockroachdb)\b.*[:/@=;]"
    r"|[^/\\]+:[^\\]*@|[a-z0-9+]*[:;]?//?[^/]*@|.*\b(?:password|passwd|pwd|user)\s*=)")
_FORM = "postgresql://user:password@host:5432/name, with what is no letter or digit in the " \
    "password as %40 is for @"


def url_of(storage: str | Path) -> str:
    """Return the URL of a storage as SQLAlchemy reads it; a path is an SQLite file.

    Raises:
        UnreachableStorage: it is neither a path nor a URL; what is said names the part that is
            wrong, and no password.
    """
    text = str(storage)
    if not text.strip():
        raise UnreachableStorage(f"storage must be a file's path or a database URL, got {text!r}; "
                                 "try runs/netwright.db")
    if "://" not in text:
        return _file(storage)
    shown = without_password(text)
    scheme, rest = text.split("://", 1)
    if _FILE.fullmatch(text):
        if rest.strip("/") in ("", ":memory:"):
            raise UnreachableStorage(f"storage {shown} is in memory, where nothing is kept; name "
                                     "a file, such as runs/netwright.db")
        return text
    _check(text, shown)
    from importlib.util import find_spec
    if scheme in ("postgres", "postgresql") and find_spec("psycopg2") is None:
        return f"postgresql+psycopg://{rest}"
    return text


def without_password(storage: str) -> str:
    """Return a storage as it may be shown: a path as it is, of a URL nothing that may be secret.

    >>> without_password("postgresql://ann:secret@host:5432/name?sslmode=require")
    'postgresql://ann:***@host:5432/name?***'
    >>> without_password("postgresql://ann:se/cr@et@host/name")
    'postgresql://***'
    """
    if "://" not in storage:
        return "***" if _looks_mistyped(storage) else storage
    if _FILE.fullmatch(storage):
        return storage if "?" not in storage or "pass" not in storage.lower() else \
            storage.split("?")[0] + "?***"
    found = _URL.fullmatch(storage)
    if found is None:
        scheme = storage.split("://", 1)[0]
        return f"{scheme if re.fullmatch(r'[A-Za-z0-9+]{1,32}', scheme) else '***'}://***"
    user = "" if found["user"] is None else found["user"] + (
        "" if found["password"] is None else ":***") + "@"
    port = "" if found["port"] is None else f":{found['port']}"
    name = "" if found["database"] is None else f"/{found['database']}"
    query = "" if found["query"] is None else "?***"
    return f"{found['scheme']}://{user}{found['host']}{port}{name}{query}"


def without_secrets(message: str, url: str) -> str:
    """Return what a driver says with the password of `url`, and all its query says, left out."""
    found = _URL.fullmatch(url)
    if found is None:
        return message.replace(url, without_password(url))
    values = [part.partition("=")[2] for part in (found["query"] or "").split("&")]
    forms = {form for secret in [found["password"] or "", *values]
             for form in (secret, unquote(secret), unquote(secret.replace("+", " ")))}
    known = {"", found["user"], found["host"], found["database"], found["scheme"]}
    for form in sorted(forms - known, key=len, reverse=True):
        message = message.replace(form, "***")
    return message


def _looks_mistyped(text: str) -> bool:
    return _MISTYPED.match(text) is not None


def _file(storage: str | Path) -> str:
    path = Path(storage)
    if path.is_dir():
        raise UnreachableStorage(f"storage {path} is a folder; name a file in it, such as "
                                 f"{path / 'netwright.db'}")
    if isinstance(storage, str) and not path.exists() and _looks_mistyped(storage):
        raise UnreachableStorage("storage has no '://' after the scheme, and what it has looks "
                                 f"like a database's URL; write it as {_FORM}")
    if not path.parent.is_dir():
        raise UnreachableStorage(f"storage {path} is in the folder {path.parent}, which does "
                                 "not exist; make it, or name another file")
    return f"sqlite:///{path}"


def _check(text: str, shown: str) -> None:
    """Raise where a URL cannot be meant as it is, and say which part it is."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError
    found = _URL.fullmatch(text)
    if found is None:
        raise UnreachableStorage(f"storage {shown} cannot be read: {_part(text)}; write it as "
                                 f"{_FORM}")
    scheme = found["scheme"].split("+")[0]
    if scheme != "postgres":
        try:
            make_url(f"{scheme}://").get_dialect()
        except (NoSuchModuleError, ArgumentError):
            raise UnreachableStorage(f"storage {shown} is neither a path nor a database URL, since "
                                     f"no kind of database is called {scheme!r}; try "
                                     "postgresql://user@host/name or runs/netwright.db") from None
        except ImportError:
            pass  # a driver that is missing is said when the storage is opened
    if scheme == "sqlite":
        raise UnreachableStorage(f"storage {shown} has a user or a host, which a file has not; "
                                 "write sqlite:///runs/netwright.db")
    if found["port"] is not None and not 0 < int(found["port"]) < 65536:
        raise UnreachableStorage(f"storage {shown} has a port that is none; it must be between 1 "
                                 "and 65535, as 5432")


def _part(text: str) -> str:
    """Return which part of a URL is wrong, without its text."""
    scheme, rest = text.split("://", 1)
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+_.-]*", scheme):
        return "its scheme, before '://', has other signs than letters, digits and +"
    if re.search(r"[\s#]", rest):
        return "it has a space or a #"
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    if rest.count("@") > 1 or ("@" in rest and "@" not in authority) \
            or authority.rpartition("@")[0].count(":") > 1:
        return "its user or password has one of / ? : @ as it is"
    if re.search(r":\D*$", authority.rpartition("@")[2]):
        return "its port is no number"
    if not re.fullmatch(r"[A-Za-z0-9._-]*|\[.*\]", authority.rpartition("@")[2].split(":")[0]):
        return "its host has signs that no host's name has"
    return "its port, or the database's name after the host, cannot be read"
