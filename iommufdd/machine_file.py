"""Machine files: TOML into a MachineDescription and back; complaints name the file, the line and the key."""

from __future__ import annotations

import functools
import os
import re
import stat
from typing import TYPE_CHECKING, Any, get_args

from .description import MOCK, AnyIommu, DeviceDescription, MachineDescription
from .errors import ENOENT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .machine_rules import Key

FOLDER = os.path.join(os.path.dirname(__file__), "machines")  # the built-in ones, NAME.toml
SUFFIX = ".toml"
LONGEST = 1 << 20  # bytes of a machine file
MANY_DOTS = 1000  # in a line

# Patterns as text: compiled when first used, since a daemon seldom reads a machine file, and its start is waited for.
SIZE = r"(0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20})([KMGT]?)"
PLACE = r"(?s)(.*) \(at (?:line (\d+), column (\d+)|end of document)\)"  # of a TOMLDecodeError
STEP = r"\.([^.\[\]`]+)|\[(\d+)\]"  # of msgspec's `$.iommu[0].mgaw`
UNKNOWN = r"(?s)Object contains unknown field `(.*)`"
MISSING = r"(?s)Object missing required field `(.*)`"
TOKEN = (
    r'(?s)"""(?:\\.|[^\\])*?"{3,5}|\'\'\'.*?\'{3,5}|"(?:\\.|[^"\\])*"|\'[^\']*\''
    r"|#[^\n]*|\n|[\[\]{}=.]|[^\s\[\]{}=.,#\"\']+|."
)


class MachineFileError(Exception):
    """A machine file that is no good; `complaints` are lines for people."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = complaints


# ---- which machines there are ------------------------------------------------------------------------------


def is_file(word: str) -> bool:
    """A machine is meant by its file: a path with a slash, or one that ends in .toml. Otherwise by its name."""
    return "/" in word or word.endswith(SUFFIX)


def built_in_names() -> list[str]:
    """The machines that every daemon knows; the first is the default."""
    files = sorted(name.removesuffix(SUFFIX) for name in os.listdir(FOLDER) if name.endswith(SUFFIX))
    return [MOCK.name, *files]


def built_in(name: str) -> MachineDescription:
    """One of built_in_names()."""
    return MOCK if name == MOCK.name else MachineFile.open(os.path.join(FOLDER, name + SUFFIX)).description()


class Machines:
    """The machines that can be asked for by name: those chosen, of which the first is the default, and the built-in."""

    def __init__(self, chosen: Iterable[str] = ()) -> None:
        """`chosen`: names and files, see is_file(). MachineFileError; ENOENT."""
        self._known: dict[str, MachineDescription] = {}
        self._files: dict[str, str] = {}
        self._built_in = built_in_names()  # now: later there may be no descriptor left to look
        names = [self.add_file(word) if is_file(word) else self.describe(word).name for word in chosen]
        self.default = next(iter(names), MOCK.name)

    def add_file(self, path: str) -> str:
        """Know the machine of a file; its name. MachineFileError."""
        file = MachineFile.open(path)
        description = file.description()
        name, taken = description.name, ""
        if name in self._built_in and description != built_in(name):
            taken = f"{name} is the name of a built-in machine, which is another"
        elif self._known.setdefault(name, description) != description:
            taken = f"{self._files[name]} has the name {name} too"
        if taken:
            raise MachineFileError([file.complaint(("name",), taken)])
        self._files.setdefault(name, path)
        return name

    @property
    def names(self) -> list[str]:
        """All that describe() knows."""
        return list(dict.fromkeys([*self._files, *self._built_in]))

    def describe(self, name: str = "") -> MachineDescription:
        """The machine of that name; '' the default. ENOENT."""
        name = name or self.default
        if name not in self._known:
            if name not in self._built_in:
                raise ENOENT(f"there is no machine {name!r}; there are {', '.join(self.names)}")
            try:
                self._known[name] = built_in(name)
            except MachineFileError as error:
                raise ENOENT(f"the machine {name!r} cannot be read: {error}") from None
        return self._known[name]


# ---- reading -----------------------------------------------------------------------------------------------


class MachineFile:
    """The text of a machine file."""

    def __init__(self, path: str, text: str) -> None:
        self.path = path
        self.text = text

    @classmethod
    def open(cls, path: str) -> MachineFile:
        """MachineFileError: it cannot be read, is longer than 1 MiB or not UTF-8."""
        try:
            with open(path, "rb", opener=_without_waiting) as file:
                data = file.read(LONGEST + 1)
        except (OSError, ValueError) as error:
            raise MachineFileError([f"{path}: {getattr(error, 'strerror', None) or error}"]) from None
        if data is None:  # BlockingIOError, as a buffered reader has it
            raise MachineFileError([f"{path}: there is nothing to read"])
        if len(data) > LONGEST:
            raise MachineFileError([f"{path}: longer than {LONGEST} bytes"])
        try:
            return cls(path, data.decode())
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise MachineFileError([f"{path}:{line}: not UTF-8: {error.reason}"]) from None

    def description(self) -> MachineDescription:
        """What it describes. MachineFileError: all complaints about syntax, else about types, else about sense."""
        import msgspec

        from .machine_rules import complaints

        data = self._tables()
        _read_sizes(data)
        if wrong := list(_wrong_types(data)):
            raise MachineFileError([self.complaint(key, text) for key, text in wrong])
        description = msgspec.convert(data, MachineDescription)
        if wrong := list(complaints(description)):
            raise MachineFileError([self.complaint(key, text) for key, text in wrong])
        return description

    def complaint(self, key: Key, text: str) -> str:
        """`FILE:LINE: iommu[0].mgaw: text`, one line whatever the keys are made of."""
        return f"{self.path}:{self._lines.of(key)}: {_one_line(f'{dotted(key)}: {text}' if key else text)}"

    @functools.cached_property
    def _lines(self) -> Lines:
        return Lines(self.text)

    def _tables(self) -> dict[str, Any]:
        import tomllib

        for number, line in enumerate(self.text.split("\n"), 1):
            if line.count(".") > MANY_DOTS:  # a key of so many parts takes tomllib for ever
                raise MachineFileError([f"{self.path}:{number}: more than {MANY_DOTS} dots in a line"])
        try:
            return tomllib.loads(self.text)
        except RecursionError:
            raise MachineFileError([f"{self.path}:1: values are nested too deep"]) from None
        except ValueError as error:  # TOMLDecodeError, and int() that finds a number too long
            found = re.fullmatch(PLACE, str(error))
            text, line, column = found.groups() if found else (str(error), "1", None)
            place = f"{line}:{column}" if column else line or str(self.text.count("\n") + 1)
            raise MachineFileError([f"{self.path}:{place}: {_one_line(text)}"]) from None


def _without_waiting(path: str, flags: int) -> int:
    """An opener: a FIFO without a writer is empty; one that has a writer, as <(...) of a shell, is read to its end."""
    fd = os.open(path, flags | os.O_NONBLOCK)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.set_blocking(fd, True)
    return fd


def _read_sizes(data: dict[str, Any]) -> None:
    """Text like "2M" or "0xfee00000" becomes a number where a region is reserved; what is no size stays for msgspec."""
    for iommu in _tables_in(data.get("iommu")):
        for region in _tables_in(iommu.get("reserved")):
            for key, value in region.items():
                if key != "kind" and isinstance(value, str) and (found := re.fullmatch(SIZE, value)):
                    region[key] = int(found[1], 0 if found[1][:2] in ("0x", "0X") else 10) << _SHIFT[found[2]]


_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _tables_in(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _wrong_types(data: dict[str, Any]) -> Iterator[tuple[Key, str]]:
    """What msgspec finds: the first of each table, so that a file has all its complaints at once."""
    rest = dict(data)
    for name, kind in (("iommu", AnyIommu), ("device", DeviceDescription)):
        tables = data.get(name)
        if isinstance(tables, list):
            del rest[name]
            for number, table in enumerate(tables):
                yield from _wrong_type(table, kind, (name, number))
    yield from _wrong_type(rest, MachineDescription, ())


def _wrong_type(table: object, kind: object, at: Key) -> Iterator[tuple[Key, str]]:
    import msgspec

    try:
        msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        text, _, path = str(error).rpartition(" - at `$")
        if not text:
            text, path = path, ""
        key = (*at, *(name or int(number) for name, number in re.findall(STEP, path)))
        if found := re.fullmatch(UNKNOWN, text):
            yield (*key, found[1]), "unknown key"
        elif found := re.fullmatch(MISSING, text):
            yield (*key, found[1]), "missing"
        else:
            yield key, text.replace("`object`", "a table") + _models(key)


def _models(key: Key) -> str:
    if key[-1:] != ("model",):
        return ""
    return f"; models are {', '.join(str(kind.__struct_config__.tag) for kind in get_args(AnyIommu))}"


def dotted(key: Key) -> str:
    """("iommu", 0, "mgaw") as iommu[0].mgaw."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in key).removeprefix(".")


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


# ---- which line a key is on --------------------------------------------------------------------------------


class Lines:
    """Where the keys of a TOML text are. The text is one that tomllib has read."""

    def __init__(self, text: str) -> None:
        self._lines: dict[Key, int] = {}
        self._last: dict[Key, int] = {}  # of an array of tables: the index of the last one
        table: Key = ()
        for line, words in _statements(text):
            if words[0] == "[":
                table = self._header(_keys(words), array=words[1] == "[")
                self._lines[table] = line
            else:
                keys = _keys(words[: words.index("=")])
                for end in range(1, len(keys) + 1):
                    self._lines.setdefault((*table, *keys[:end]), line)

    def _header(self, keys: list[str], *, array: bool) -> Key:
        table: Key = ()
        for key in keys[:-1] if array else keys:
            table = (*table, key)
            if table in self._last:
                table = (*table, self._last[table])
        if array:
            table = (*table, keys[-1])
            self._last[table] = self._last.get(table, -1) + 1
            table = (*table, self._last[table])
        return table

    def of(self, key: Key) -> int:
        """The line, from 1, of a key; of the table it should be in when it is not there."""
        ends = range(len(key), 0, -1)
        return next((self._lines[key[:end]] for end in ends if key[:end] in self._lines), 1)


def _statements(text: str) -> Iterator[tuple[int, list[str]]]:
    """Table headers and key-value pairs: (line, words without blanks and comments)."""
    line = start = 1
    depth = 0
    words: list[str] = []
    for token in re.findall(TOKEN, text):
        if token == "\n" and not depth and words:
            yield start, words
            words = []
        elif not token.isspace() and not token.startswith("#"):
            if not words:
                start = line
            depth += (token in ("[", "{")) - (token in ("]", "}"))
            words.append(token)
        line += token.count("\n")
    if words:
        yield start, words


def _keys(words: list[str]) -> list[str]:
    """The parts of a key, of which some may be quoted."""
    import tomllib

    parts = [word for word in words if word not in (".", "[", "]")]
    return [tomllib.loads(f"key = {part}")["key"] if part[0] in "\"'" else part for part in parts]


# ---- writing -----------------------------------------------------------------------------------------------


def toml(description: MachineDescription) -> str:
    """The machine file of a description, every default spelt out; reading it gives the description again."""
    import msgspec

    return "\n".join(_table("", msgspec.to_builtins(description)))


def _table(name: str, table: dict[str, Any]) -> Iterator[str]:
    """Lines: the plain values first, then the tables within."""
    inner = {key: value for key, value in table.items() if _is_table(value)}
    for key, value in table.items():
        if key not in inner and value is not None:
            yield f"{key} = {plain(key, value)}"
    for key, value in inner.items():
        path = f"{name}.{key}" if name else key
        header = f"[{path}]" if isinstance(value, dict) else f"[[{path}]]"
        for each in [value] if isinstance(value, dict) else value:
            yield from ("", header, *_table(path, each))
    if not name:
        yield ""


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list | tuple) and bool(_tables_in(list(value))))


def plain(key: str, value: object) -> str:
    """A value as TOML has it; addresses in hexadecimal."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:#x}" if key in ("start", "last") else str(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(plain(key, each) for each in value)}]"
    return f'"{value}"'  # of the few characters that names and choices are made of
