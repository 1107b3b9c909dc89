"""Which tests need huge pages, read from a source; and the huge pages themselves."""

from pathlib import Path

import pytest

from tests.selftest import exceptions, hugepages
from tests.selftest.say import CannotError

SUITE = """\
FIXTURE_SETUP(plain)
{
}

TEST_F(plain, huge_map)
{
	buf = mmap(0, 1, MAP_HUGETLB);
}

FIXTURE_SETUP(flags)
{
	if (variant->hugepages) {
		self->mmap_flags |= MAP_HUGETLB;
	}
}

FIXTURE_VARIANT_ADD(flags, small)
{
	.hugepages = false,
};

FIXTURE_VARIANT_ADD(flags, huge)
{
	.hugepages = true,
};

FIXTURE_VARIANT_ADD(flags, file_huge)
{
	.hugepages = true,
	.file = true,
};

static void
helper(struct __test_metadata *_metadata,
       int unused)
{
	mmap(0, 1, self->mmap_flags);
}

TEST_F(flags, direct)
{
	mmap(0, 1, self->mmap_flags);
}

TEST_F(flags, by_helper)
{
	helper(_metadata, 0);
}

TEST_F(flags, none)
{
	ASSERT_EQ(0, 0);
}

FIXTURE_SETUP(all)
{
	int flags = MAP_HUGETLB;
	vrc = mmap(0, 1, flags);
}

FIXTURE_VARIANT_ADD(all, huge)
{
	.hugepages = true,
};

TEST_F(all, any)
{
}
"""


def test_which_tests_need_hugepages() -> None:
    assert exceptions.need_hugepages(SUITE) == [
        "all.huge.any",
        "flags.huge.by_helper",
        "flags.huge.direct",
        "plain.huge_map",
    ]
    assert len(exceptions.all_tests(SUITE)) == 1 + 3 * 3 + 1


def test_hugepages_are_given_back() -> None:
    assert hugepages.available() == hugepages.available()
    assert not hugepages.available(1 << 30)


def test_reserved_hugepages_go_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = tmp_path / "nr_hugepages"
    pool.write_text("7\n")
    monkeypatch.setattr(hugepages, "KERNEL", pool)
    monkeypatch.setattr(hugepages, "available", lambda _: False)
    with hugepages.reserved(5):
        assert int(pool.read_text()) == 12
        pool.write_text("14")  # another's, meanwhile
    assert int(pool.read_text()) == 9
    monkeypatch.setattr(hugepages, "KERNEL", tmp_path / "none")
    with pytest.raises(CannotError, match="only root"), hugepages.reserved(5):
        pass
