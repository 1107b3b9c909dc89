"""Room uapi: what a C compiler says about the kernel's headers, as JSON: sizes, offsets, numbers.

    python uapi/golden/generate.py HEADER_DIR IOMMUFD_TEST_H > uapi/golden/linux-7.2.json

HEADER_DIR holds `linux/iommufd.h` and `linux/vfio.h`. Which structs, fields and constants there are is read
from the text of the headers, so that a new one shows up; what they are is asked of `cc`. Names and numbers
only.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

Field = tuple[str, bool]  # C designator, flexible array?

IDENTIFIER = r"[A-Za-z_]\w*"
MEMBER = re.compile(rf"({IDENTIFIER})\s*(\[[^\]]*\])?\s*(?:__counted_by\(\w+\)\s*)?$")
DEFINE = re.compile(rf"^[ \t]*#[ \t]*define[ \t]+({IDENTIFIER})[ \t]+(\S.*)$", re.MULTILINE)
ENUM = re.compile(rf"\benum\s*({IDENTIFIER})?\s*\{{([^}}]*)\}}")
STRUCT = re.compile(rf"^struct\s+({IDENTIFIER})\s*\{{", re.MULTILINE)

PROGRAM = """
#include <stddef.h>
#include <stdio.h>
%(includes)s
#define SIZE(type) printf("struct %%s %%zu\\n", #type, sizeof(struct type));
#define FIELD(type, f) printf("field %%s %%s %%zu %%zu\\n", #type, #f, offsetof(struct type, f), \\
                              sizeof(((struct type *)0)->f));
#define FLEXIBLE(type, f) printf("field %%s %%s %%zu 0\\n", #type, #f, offsetof(struct type, f));
#define CONSTANT(name) printf("constant %%s %%lld\\n", #name, (long long)(name));
int main(void)
{
%(body)s
    return 0;
}
"""


# ---- the text of a header ----------------------------------------------------------------------------------


def without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"//[^\n]*", " ", text).replace("\\\n", " ")


def closing(text: str, start: int) -> int:
    """Index of the brace that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return index
    raise ValueError("unbalanced braces")


def fields(body: str, prefix: str = "") -> Iterator[Field]:
    """Members of a struct or union: those of an anonymous one as its own, those of a named one with a dot."""
    body = re.sub(r"^[ \t]*#.*$", "", body, flags=re.MULTILINE)
    while body.strip():
        brace, semicolon = body.find("{"), body.find(";")
        if 0 <= brace < semicolon:
            end = closing(body, brace)
            inner = body[brace + 1 : end]
            name, _, body = (part.strip() for part in body[end + 1 :].partition(";"))
            yield from fields(inner, f"{prefix}{name}." if name else prefix)
            continue
        declaration, _, body = body.partition(";")
        found = MEMBER.search(declaration.strip())
        if found is None or "," in declaration:
            raise ValueError(f"declaration not understood: {declaration}")
        yield prefix + found[1], found[2] == "[]"


def structs(text: str) -> dict[str, list[Field]]:
    return {
        found[1]: list(fields(text[found.end() : closing(text, found.end() - 1)]))
        for found in STRUCT.finditer(text)
    }


def enums(text: str) -> Iterator[tuple[str, list[str]]]:
    """Name, "" for an anonymous one, and the names of the values."""
    for found in ENUM.finditer(text):
        values = re.sub(r"\([^()]*\)", "", found[2])
        yield found[1] or "", re.findall(rf"(?:^|,)\s*({IDENTIFIER})", values)


def constants(text: str) -> list[str]:
    """Values of enums, and macros that are numbers: no parameters, no string."""
    found = [value for _, values in enums(text) for value in values]
    found += [name for name, value in DEFINE.findall(text) if not value.startswith('"')]
    return list(dict.fromkeys(found))


# ---- the compiler's answer ---------------------------------------------------------------------------------


def program(include: str, text: str) -> str:
    lines = []
    for name, members in structs(text).items():
        lines.append(f"    SIZE({name})")
        lines += [f"    {'FLEXIBLE' if flexible else 'FIELD'}({name}, {f})" for f, flexible in members]
    lines += [f"    CONSTANT({name})" for name in constants(text)]
    return PROGRAM % {"includes": include, "body": "\n".join(lines)}


def run(source: str, headers: Path) -> list[list[str]]:
    """Compile and run; the words of each line printed."""
    includes = [headers, *sorted(headers.glob("*-linux-gnu*"))]
    with tempfile.TemporaryDirectory() as directory:
        binary = Path(directory, "golden")
        command = ["cc", "-w", "-x", "c", "-", "-o", str(binary), *(f"-I{path}" for path in includes)]
        subprocess.run(command, input=source, text=True, check=True)
        output = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in output.splitlines()]


def ask(include: str, text: str, headers: Path) -> dict[str, object]:
    text = without_comments(text)
    sizes: dict[str, dict[str, object]] = {}
    members: dict[str, dict[str, list[int]]] = {}
    numbers: dict[str, int] = {}
    for kind, name, *rest in run(program(include, text), headers):
        if kind == "struct":
            members[name] = {}
            sizes[name] = {"size": int(rest[0]), "fields": members[name]}
        elif kind == "field":
            members[name][rest[0]] = [int(rest[1]), int(rest[2])]
        else:
            numbers[name] = int(rest[0])
    ioctls = {name for name, value in DEFINE.findall(text) if value.startswith("_IO")}
    return {
        "structs": sizes,
        "ioctls": {name: value for name, value in numbers.items() if name in ioctls},
        "enums": {name: values for name, values in enums(text) if name},
        "constants": {name: value for name, value in numbers.items() if name not in ioctls},
    }


def version(headers: Path) -> str:
    asked = {"includes": "#include <linux/version.h>", "body": "CONSTANT(LINUX_VERSION_CODE)"}
    code = int(run(PROGRAM % asked, headers)[0][2])
    return f"{code >> 16}.{code >> 8 & 255}.{code & 255}"


def dump(golden: dict[str, object]) -> str:
    """JSON with one line for a field."""
    text = json.dumps(golden, indent=1)
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text)


def main(headers: Path, test_header: Path) -> None:
    sources = {
        "iommufd": ("#include <linux/iommufd.h>", headers / "linux/iommufd.h"),
        "vfio": ("#include <linux/vfio.h>", headers / "linux/vfio.h"),
        "iommufd_test": (f'#include "{test_header.absolute()}"', test_header),
    }
    golden: dict[str, object] = {"version": version(headers)}
    for name, (include, path) in sources.items():
        golden[name] = ask(include, path.read_text(), headers)
    print(dump(golden))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
