"""Attach, replace and detach: what fails leaves the old attachment, in groups of one device and of several."""

import errno

from iommufdd.user import PAGE_SIZE

from .harness import APERTURE, NOWHERE, PASID, PASID_DEVICE, Client
from .invariants import check
from .snapshot import difference, state


def test_replace_by_an_ioas_whose_pages_cannot_be_pinned_keeps_the_attachment() -> None:
    """iommufd_hwpt_paging_alloc() detaches at out_detach only what it attached: nothing, in a replace."""
    c = Client()
    ioas, other = c.ioas_alloc(), c.ioas_alloc()
    mock = c.mock_domain(ioas)
    c.map(other, NOWHERE, PAGE_SIZE, APERTURE)
    before = state(c.world)
    c.replace(mock.stdev, other, expect=errno.EFAULT)
    assert not difference(before, state(c.world))


def test_destroying_a_mock_device_detaches_its_pasids() -> None:
    """The kernel forgets them (WARN_ON in iommufd_object_destroy_user()) and goes on with freed memory."""
    c = Client()
    ioas = c.ioas_alloc()
    mock = c.mock_domain(ioas, PASID_DEVICE)
    hwpt = c.hwpt(mock.idev, ioas, PASID)
    c.replace(mock.stdev, hwpt)
    c.pasid_attach(mock.stdev, 1, hwpt)
    c.pasid_attach(mock.stdev, 2, hwpt)
    c.destroy(mock.stdev)
    c.destroy(mock.idev, errno.ENOENT)
    c.destroy(hwpt)
    check(c.world)
    c.close()
