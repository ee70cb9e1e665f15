"""A storage's password is shown nowhere, and a URL that is wrong says where."""

from urllib.parse import unquote

import pytest

import netwright as nw
from netwright.compare.urls import url_of, without_password, without_secrets
from netwright.errors import UnreachableStorage

SECRET = "s3cr3t"
WITH_PASSWORD = [form.replace("PW", word) for word in (SECRET, f"{SECRET}%40x", f"%2F{SECRET}")
                 for form in (
    "postgresql://u:PW@127.0.0.1:9/db", "postgresql+psycopg://u:PW@127.0.0.1:9/db",
    "postgresql://127.0.0.1:9/db?user=u&password=PW", "postgres://u:PW@127.0.0.1:9/db",
    "postgresql://u@127.0.0.1:9/db?password=PW&sslmode=disable",
    "postgresql://u:PW@127.0.0.1:9/db?application_name=x&passfile=PW")]
MISTYPED = [form.replace("PW", SECRET) for form in (
    "postgresql:/u:PW@host/db", "postgresql//u:PW@host/db", "postgresql:u:PW@host/db",
    "postgres;//u:PW@host/db", "u:PW@host/db", "u:PW@host:5432/db", "//u:PW@host/db",
    "postgresql:://u:PW@host/db", "postgresql ://u:PW@host/db", "postgresql://u:PW@host:port/db",
    "postgresql://u:PW@ho st/db", "postgresql://u:PW@x@host/db", "postgresql://u:PW/x@host/db",
    "postgresql://u:x/PW@host/db", "postgresql://u:x?PW@host/db", "postgresql://u:x#PW@host/db",
    "postgresql://u:x@PW@host/db", "postgresql://:PW@:x/db",
    "postgresql://u:PW@host:99999/db", "postgresql://u:PW@[::1/db", "postgresql://u:PW@host:/db",
    "postgresql://u:PW @host/db", "postgresql://u: PW@host/db", "postgrsql://u:PW@host/db",
    "http://u:PW@host/db", "ftp://u:PW@host", "mysqll://u:PW@host/db?x=y",
    "://u:PW@host/db", "sqlite://u:PW@host/db", "host=h user=u password=PW dbname=d",
    "db?user=u&password=PW", "postgresql://u:PW@host/d b", "postgresql://u:PW@host/db#x",
    "postgresql\\u:PW@host", "postgresql@u:PW@host", "postgresql://u:PW@ho%st/db")]


def shown(error):
    seen = []
    while error is not None:
        seen.append(str(error))
        error = None if error.__suppress_context__ and error.__cause__ is None else (
            error.__cause__ or error.__context__)
    return "\n".join(seen)


@pytest.mark.parametrize("url", WITH_PASSWORD)
def test_no_password_is_shown(url):
    assert SECRET not in without_password(url)
    assert SECRET not in without_secrets(f"cannot connect with {url}, {unquote(url)}", url)
    with pytest.raises(UnreachableStorage) as caught:
        nw.recorded(url)
    assert SECRET not in shown(caught.value)


@pytest.mark.parametrize("url", MISTYPED)
def test_a_mistyped_url_gets_one_line_without_the_password(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SECRET not in without_password(url)
    for call in (lambda: nw.recorded(url), lambda: url_of(url),
                 lambda: nw.compare("digits-mlp", ["Backprop"], storage=url, progress=False)):
        with pytest.raises(UnreachableStorage, match="storage") as caught:
            call()
        assert SECRET not in shown(caught.value)
        assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("url", "part"), [
    ("postgresql://u:p@h:x/db", "port"), ("postgresql://u:p/q@h/db", "password"),
    ("postgresql://u:p@h h/db", "space"), ("post~gresql://u:p@h/db", "scheme"),
    ("postgresql://u:p@h:70000/db", "port"), ("nosql://u:p@h/db", "'nosql'"),
    ("postgresql:/u:p@h/db", "'://'"), ("", "path"),
])
def test_the_part_that_is_wrong_is_named(url, part):
    with pytest.raises(UnreachableStorage, match=part):
        url_of(url)


def test_paths_stay_paths(tmp_path):
    for path in ("a.db", tmp_path / "a b@c.db", "sub@x.db", str(tmp_path / "user=me.db")):
        if "=" not in str(path):
            assert without_password(str(path)) == str(path)
        assert url_of(tmp_path / path).startswith("sqlite:///")
