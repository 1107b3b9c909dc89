"""Machine files: what is read, and that every complaint names the file, the line and the key."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iommufdd import machine_file
from iommufdd.description import MOCK, MachineDescription, VtdIommu
from iommufdd.errors import ENOENT
from iommufdd.machine_file import MachineFile, MachineFileError, Machines, built_in, built_in_names, is_file, toml
from iommufdd.machine_rules import DEVICE, IOMMU, RESERVED, SMMUV3, VTD, Rule
from iommufdd.machine_rules import MOCK as MOCK_RULES

GOOD = """\
name = "two"

[[iommu]]
name = "dmar0"
model = "vtd"

[[iommu]]
name = "mock0"
model = "mock"

[[device]]
name = "nic"
bdf = "0000:01:00.0"
iommu = "dmar0"
ats = true
pri = true
pasid-width = 20

[[device]]
name = "disk"
bdf = "02:00.0"
iommu = "mock0"
"""


def read(text: str) -> MachineDescription:
    return MachineFile("lab.toml", text).description()


def complaints(text: str) -> list[str]:
    with pytest.raises(MachineFileError) as caught:
        read(text)
    return list(caught.value.complaints)


def changed(old: str, new: str, text: str = GOOD) -> str:
    assert text.count(old) == 1
    return text.replace(old, new)


def line_of(text: str, part: str) -> int:
    assert text.count(part) == 1
    return text.count("\n", 0, text.index(part)) + 1


def test_a_good_file() -> None:
    machine = read(GOOD)
    assert [iommu.name for iommu in machine.iommu] == ["dmar0", "mock0"]
    assert machine.device[0].pasid_width == 20
    assert not machine.device[1].ats
    (dmar0, _) = machine.iommu
    assert isinstance(dmar0, VtdIommu)
    assert dmar0.levels == (4, 5)


# ---- types -------------------------------------------------------------------------------------------------

# what of GOOD is replaced, by what, the key, a part of the text, and what stands on the line
TYPES = [
    ('name = "two"', 'nam = "two"', "nam", "unknown key", "nam ="),
    ('name = "two"', 'name = "two@"', "name", "matching regex", "two@"),
    ('name = "two"', 'name = "two\\n"', "name", "matching regex", "two"),
    ('name = "two"', 'name = ".."', "name", "matching regex", ".."),
    ('model = "vtd"', 'model = "vt"', "iommu[0].model", "Invalid value 'vt'; models are vtd, smmuv3, mock", '"vt"'),
    ('model = "vtd"', 'model = "vtd"\nmgaw = 3', "iommu[0].mgaw", "Expected `int` >= 30", "mgaw"),
    ('model = "vtd"', 'model = "vtd"\nnested = 1', "iommu[0].nested", "Expected `bool`, got `int`", "nested"),
    ('model = "vtd"', 'model = "vtd"\nhaw = 52.0', "iommu[0].haw", "Expected `int`, got `float`", "haw"),
    ('model = "vtd"', 'model = "vtd"\nhaw = 1979-05-27', "iommu[0].haw", "Expected `int`, got `date`", "haw"),
    ('model = "vtd"', 'model = "vtd"\nmga = 3', "iommu[0].mga", "unknown key", "mga"),
    ('model = "vtd"', 'model = "vtd"\n"m\\ng" = 3', "iommu[0].m\\ng", "unknown key", "m\\ng"),
    ('model = "mock"', 'model = "mock"\nmgaw = 39', "iommu[1].mgaw", "unknown key", "mgaw"),
    ('model = "vtd"', 'model = "vtd"\nlevels = [\n4,\n6]', "iommu[0].levels[1]", "Invalid enum value 6", "levels"),
    ('model = "vtd"', 'model = "vtd"\ncaches.mode = "x"', "iommu[0].caches.mode", "Invalid enum value 'x'", "caches"),
    ('model = "vtd"', 'model = "vtd"\n[iommu.caches]\nseed = -1', "iommu[0].caches.seed", "`int` >= 0", "seed"),
    (
        'model = "vtd"',
        'model = "vtd"\n[[iommu.reserved]]\nstart = "2X"\nlast = 3',
        *("iommu[0].reserved[0].start", "Expected `int`, got `str`", "start"),
    ),
    ('model = "vtd"\n', "", "iommu[0].model", "missing", '[[iommu]]\nname = "dmar0"'),
    ('bdf = "02:00.0"\n', "", "device[1].bdf", "missing", '[[device]]\nname = "disk"'),
    ('bdf = "02:00.0"', 'bdf = "2:0.0"', "device[1].bdf", "matching regex", "2:0.0"),
    ("pasid-width = 20", "pasid-width = 21", "device[0].pasid-width", "`int` <= 20", "pasid-width"),
    ("pasid-width = 20", "group = -1", "device[0].group", "`int` >= 0", "group"),
    ("pasid-width = 20", "pasid-width = 20\n[nonsense]", "nonsense", "unknown key", "[nonsense]"),
]


@pytest.mark.parametrize(("old", "new", "key", "text", "place"), TYPES)
def test_types(old: str, new: str, key: str, text: str, place: str) -> None:
    wrong = changed(old, new)
    (complaint,) = complaints(wrong)
    assert complaint.startswith(f"lab.toml:{line_of(wrong, place)}: {key}: ")
    assert text in complaint


def test_tables_that_are_none() -> None:
    assert complaints('name = "x"\niommu = 3') == ["lab.toml:2: iommu: Expected `array`, got `int`"]
    assert complaints('name = "x"\n\niommu = [3]') == ["lab.toml:3: iommu[0]: Expected a table, got `int`"]
    assert complaints("") == ["lab.toml:1: name: missing"]


def test_every_table_is_complained_about_at_once() -> None:
    wrong = changed("ats = true", "ats = 1", changed('model = "mock"', 'model = "m"', changed('name = "two"', "")))
    assert [complaint.split(": ")[1] for complaint in complaints(wrong)] == ["iommu[1].model", "device[0].ats", "name"]


# ---- sense -------------------------------------------------------------------------------------------------

SENSE = [
    (RESERVED, 0, 'model = "vtd"', 'model = "vtd"\n[[iommu.reserved]]\nstart = 2\nlast = 1', "start ="),
    (
        *(RESERVED, 1, 'model = "vtd"'),
        'model = "vtd"\nreserved = [{start = 0, last = 0x10000000000000000}]',
        "reserved",
    ),
    (IOMMU, 0, 'name = "mock0"', 'name = "dmar0" # again', "again"),
    (VTD, 0, 'model = "vtd"', 'model = "vtd"\nfirst-stage=false\nsecond-stage=false\nnested=false', "first-stage"),
    (VTD, 1, 'model = "vtd"', 'model = "vtd"\nfirst-stage = false\nnested = true', "nested"),
    (VTD, 1, 'model = "vtd"', 'model = "vtd"\nsecond-stage = false', '[[iommu]]\nname = "dmar0"'),
    (VTD, 2, 'model = "vtd"', 'model = "vtd"\nlevels = []', "levels"),
    (VTD, 3, 'model = "vtd"', 'model = "vtd"\nlevels = [5, 5]', "levels"),
    (VTD, 4, 'model = "vtd"', 'model = "vtd"\nlevels = [3, 4]\nmgaw = 49', "levels"),
    (VTD, 5, 'model = "vtd"', 'model = "vtd"\ndomain-ids = 32', "domain-ids"),
    (MOCK_RULES, 0, 'model = "mock"', 'model = "mock"\nreserved = [{start = 0, last = 1}]', "reserved"),
    (MOCK_RULES, 1, 'model = "mock"', 'model = "mock"\ncaches = {mode = "off"}', "caches"),
    (DEVICE, 0, 'name = "disk"', 'name = "nic" # again', "again"),
    (DEVICE, 1, 'bdf = "02:00.0"', 'bdf = "01:00.0"', '"01:00.0"'),
    (DEVICE, 2, 'iommu = "mock0"', 'iommu = "mock1"', "mock1"),
    (
        *(DEVICE, 3, 'pasid-width = 20\n\n[[device]]\nname = "disk"'),
        'group = 7\n\n[[device]]\ngroup = 7 # too\nname = "disk"',
        "# too",
    ),
    (DEVICE, 4, "ats = true\n", "", "pri ="),
    (DEVICE, 5, 'model = "vtd"', 'model = "vtd"\npage-requests = false', "pri ="),
    (DEVICE, 6, 'model = "vtd"', 'model = "vtd"\npasid-width = 19 # less', "pasid-width = 20"),
    (DEVICE, 7, 'iommu = "mock0"', 'iommu = "mock0"\npasid-width = 8', "pasid-width = 8"),
    (DEVICE, 8, 'iommu = "mock0"', 'iommu = "mock0"\ncoherent = false', "coherent"),
    (DEVICE, 11, 'iommu = "mock0"', 'iommu = "mock0"\nstream-id = 3', "stream-id"),
    (DEVICE, 14, 'iommu = "mock0"', 'iommu = "mock0"\nstreams = 3', "streams"),
    (DEVICE, 15, 'iommu = "mock0"', 'iommu = "mock0"\nstall = true', "stall"),
    (DEVICE, 18, 'iommu = "mock0"', 'iommu = "mock0"\ncanwbs = true', "canwbs"),
]


@pytest.mark.parametrize(("rules", "number", "old", "new", "place"), SENSE)
def test_sense(rules: tuple[Rule[Any], ...], number: int, old: str, new: str, place: str) -> None:
    """The complaint of the rule is there: its line, its key, its words."""
    complained_about(changed(old, new), rules[number], place)


SMMU = GOOD.replace('model = "vtd"', 'model = "smmuv3"').replace('iommu = "mock0"', 'iommu = "dmar0" # too')
SMMU_SENSE = [
    (SMMUV3, 0, 'model = "smmuv3"', 'model = "smmuv3"\nstage1 = false\nstage2 = false', "stage1"),
    (SMMUV3, 1, 'model = "smmuv3"', 'model = "smmuv3"\ngranules = []', "granules"),
    (SMMUV3, 2, 'model = "smmuv3"', 'model = "smmuv3"\ngranules = [4, 4]', "granules"),
    (SMMUV3, 3, 'model = "smmuv3"', 'model = "smmuv3"\nvax = 52', "vax"),
    (SMMUV3, 4, 'model = "smmuv3"', 'model = "smmuv3"\ncmdqv = true\nvcmdqs-log2 = 5', "vcmdqs-log2"),
    (SMMUV3, 5, 'model = "smmuv3"', 'model = "smmuv3"\nvintfs-log2 = 5', "vintfs-log2"),
    (SMMUV3, 6, 'model = "smmuv3"', 'model = "smmuv3"\nvcmdqs-log2 = 6', "vcmdqs-log2"),
    (SMMUV3, 7, 'model = "smmuv3"', 'model = "smmuv3"\nvintf-sids-log2 = 3', "vintf-sids-log2"),
    (DEVICE, 9, 'model = "smmuv3"', 'model = "smmuv3"\npage-requests = false', "pri ="),
    (DEVICE, 10, "# too", "\ncoherent = false", "coherent"),
    (DEVICE, 12, "# too", "\nstream-id = 0x10000", "stream-id"),
    (DEVICE, 13, "# too", "\nstream-id = 0xff\nstreams = 2", "stream-id"),
    (DEVICE, 16, 'model = "smmuv3"', 'model = "smmuv3"\nstall = "none"', "stall = true"),
    (DEVICE, 17, "# too", "\nats = true\nstall = true # twice", "twice"),
]


@pytest.mark.parametrize(("rules", "number", "old", "new", "place"), SMMU_SENSE)
def test_sense_behind_an_smmu(rules: tuple[Rule[Any], ...], number: int, old: str, new: str, place: str) -> None:
    stalls = changed("# too", "\nstall = true", SMMU) if place == "stall = true" else SMMU
    complained_about(changed(old, new, stalls), rules[number], place)


def complained_about(wrong: str, rule: Rule[Any], place: str) -> None:
    words = re.sub(r"\\{.*?\\}", ".*", re.escape(rule.text))
    expected = rf"lab\.toml:{line_of(wrong, place)}: (iommu|device)\[\d\]\.(reserved\[\d\]\.)?{rule.key}: {words}"
    assert any(re.fullmatch(expected, complaint) for complaint in complaints(wrong))


def test_every_rule_has_its_test() -> None:
    for rules in (RESERVED, IOMMU, VTD, SMMUV3, MOCK_RULES, DEVICE):
        assert {number for tested, number, *_ in (*SENSE, *SMMU_SENSE) if tested is rules} == set(range(len(rules)))


def test_what_looks_alike_makes_sense() -> None:
    read(changed('model = "vtd"', 'model = "vtd"\nlevels = [3]\nmgaw = 39'))
    read(changed('model = "vtd"', 'model = "vtd"\nsecond-stage = false\nnested = false\nlevels = []'))
    read(changed('bdf = "02:00.0"', 'bdf = "0001:01:00.0"'))
    read(changed('iommu = "mock0"', 'iommu = "dmar0"\ngroup = 0', changed("pasid-width = 20", "group = 0")))
    read(changed('iommu = "mock0"', 'iommu = "mock0"\npasid-width = 20'))


# ---- the text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('name = "x"\niommu = ', "2"),  # the end
        ('name = "x"\n[[iommu]\n', "2:"),
        ('name = "x"\nname = "y"\n', "2:"),
        ("a = " + "[" * 20_000, "1"),
        ("a = " + "9" * 5000, "1"),
    ],
)
def test_syntax(text: str, place: str) -> None:
    (complaint,) = complaints(text)
    assert complaint.startswith(f"lab.toml:{place}")
    assert "\n" not in complaint


def test_lines_of_keys_in_all_their_forms() -> None:
    text = '''name = "x"
iommu = []
# [[device]] is not one
device = [
  { name = "a", bdf = "00:00.0", iommu = "none" },
]
unknown."with.dots".'and quotes' = """
[[iommu]]
mgaw = 1 """   # a comment = [
[other]
x = [ "]", ']', """
]""",
]
last = 1
'''
    assert complaints(text) == ["lab.toml:7: unknown: unknown key"]
    assert MachineFile("f", text).complaint(("unknown", "with.dots", "and quotes"), "").startswith("f:7: ")
    assert MachineFile("f", text).complaint(("other", "x", 2), "").startswith("f:11: ")
    assert MachineFile("f", text).complaint(("other", "last"), "").startswith("f:14: ")
    assert MachineFile("f", text).complaint(("device", 0, "bdf"), "").startswith("f:4: ")


def test_sizes() -> None:
    region = "\n[[iommu.reserved]]\nstart = {}\nlast = {}\n"
    for start, last in (("0xfee00000", "0xfeefffff"), ('"0xfee00000"', '"0XFEEFFFFF"'), ('"4078M"', "4277141503")):
        text = changed('model = "vtd"', 'model = "vtd"' + region.format(start, last))
        assert [(each.start, each.last) for each in read(text).iommu[0].reserved] == [(0xFEE00000, 0xFEEFFFFF)]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def complaint(path: str) -> str:
        with pytest.raises(MachineFileError) as caught:
            MachineFile.open(path)
        return str(caught.value)

    assert complaint(f"{tmp_path}/none.toml") == f"{tmp_path}/none.toml: No such file or directory"
    assert complaint(str(tmp_path)) == f"{tmp_path}: Is a directory"
    assert "embedded null" in complaint("a\0b")
    path = tmp_path / "x.toml"
    path.write_bytes(b'name = "x"\n# \xff\n')
    assert complaint(str(path)) == f"{path}:2: not UTF-8: invalid start byte"
    os.truncate(path, 1 << 30)
    assert complaint(str(path)) == f"{path}: longer than 1048576 bytes"


@given(data=st.data())
def test_no_mutation_of_the_text_gives_a_traceback(data: st.DataObject) -> None:
    """Every text is a machine, which its own TOML describes, or has complaints of one line each."""
    text = data.draw(st.sampled_from([GOOD, toml(built_in("vtd"))]))
    pieces = st.sampled_from([*'"[]{}=.,#\n-0', "'", '"""', "[[iommu]]", "[iommu.caches]", "mgaw = 3", "true", "1e5"])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        text = text[:start] + data.draw(pieces | st.text(max_size=3)) + text[end:]
    try:
        machine = read(text)
    except MachineFileError as error:
        last = text.count("\n") + 1
        for complaint in error.complaints:
            assert complaint.startswith("lab.toml:")
            assert complaint.isprintable()
            assert 1 <= int(complaint.split(":")[1]) <= last
    else:
        assert read(toml(machine)) == machine


# ---- which machines there are ------------------------------------------------------------------------------


def test_the_built_in_machines() -> None:
    assert built_in_names() == ["mock", "smmuv3", "tegra241", "vtd"]
    machines = Machines()
    assert machines.describe() is MOCK
    assert [device.name for device in machines.describe("vtd").device] == ["vfio0", "vfio1", "vfio2", "vfio3"]
    for name in built_in_names():
        assert built_in(name).name == name
        assert read(toml(built_in(name))) == built_in(name)


def test_chosen_machines(tmp_path: Path) -> None:
    path = tmp_path / "lab.toml"
    path.write_text(GOOD)
    machines = Machines([str(path), "vtd", str(path)])
    assert (machines.default, machines.names) == ("two", ["two", "mock", "smmuv3", "tegra241", "vtd"])
    assert machines.describe() == read(GOOD)
    assert Machines(["vtd", str(path)]).default == "vtd"
    assert Machines([str(path), "two"]).default == "two"
    with pytest.raises(ENOENT, match="there is no machine 'other'; there are two, mock, smmuv3, tegra241, vtd"):
        Machines([str(path)]).describe("other")
    with pytest.raises(ENOENT):
        Machines(["two"])


def test_a_machine_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machines = Machines()
    monkeypatch.setattr(machine_file, "FOLDER", str(tmp_path))
    with pytest.raises(ENOENT, match=r"the machine 'vtd' cannot be read: .*No such file"):
        machines.describe("vtd")


def test_a_name_means_one_machine(tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a.toml", "b.toml", "c.toml"))
    first.write_text(GOOD)
    second.write_text(changed("ats = true", "ats = true\nvirtual-function = true"))
    third.write_text("# mine\n" + changed('"two"', '"vtd"'))
    with pytest.raises(MachineFileError, match=rf"{second}:1: name: {first} has the name two too"):
        Machines([str(first), str(second)])
    with pytest.raises(MachineFileError, match=rf"{third}:2: name: vtd is the name of a built-in machine"):
        Machines([str(third)])
    third.write_text(toml(built_in("vtd")))
    assert Machines([str(third)]).describe() == built_in("vtd")


def test_files_and_names() -> None:
    assert all(map(is_file, ("./vtd", "vtd.toml", "/a/b")))
    assert not any(map(is_file, ("vtd", "a.b", "ci@vtd")))


# ---- files that are none -----------------------------------------------------------------------------------


def complaints_of(path: str) -> list[str]:
    with pytest.raises(MachineFileError) as caught:
        MachineFile.open(path).description()
    return list(caught.value.complaints)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "fifo.toml"
    os.mkfifo(path)
    assert complaints_of(str(path)) == [f"{path}:1: name: missing"]


def test_a_pipe_of_the_shell_is_read_to_its_end() -> None:
    read, write = os.pipe()
    with os.fdopen(read), os.fdopen(write, "wb") as file:
        file.write(b'name = "from-a-pipe"')
        file.close()
        assert MachineFile.open(f"/dev/fd/{read}").description().name == "from-a-pipe"


@pytest.mark.parametrize(("path", "why"), [("/dev/zero", "longer than 1048576 bytes"), ("/", "Is a directory")])
def test_what_is_no_file(path: str, why: str) -> None:
    assert complaints_of(path) == [f"{path}: {why}"]


def test_a_file_with_many_mistakes_is_read_once(tmp_path: Path) -> None:
    """A complaint each, and their lines: 20,000 times a file of 20,000 lines would take hours."""
    path = tmp_path / "many.toml"
    path.write_text('name = "many"\n' + "[[iommu]]\n" * 20_000)
    found = complaints_of(str(path))
    assert len(found) == 20_000
    assert found[-1] == f"{path}:20001: iommu[19999].model: missing"


@pytest.mark.parametrize("text", ["a" + ".a" * 400_000 + " = 1", "[" + "a." * 400_000 + "a]"])
def test_a_key_of_very_many_parts(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dots.toml"
    path.write_text(f"name = 'dots'\n{text}\n")
    assert complaints_of(str(path)) == [f"{path}:2: more than 1000 dots in a line"]
