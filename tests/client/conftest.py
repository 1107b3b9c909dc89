"""The daemon that the tests talk to, and a fresh /dev/iommu for each of them."""

from iommufd_client.pytest_plugin import iommufd, iommufdd_daemon

__all__ = ["iommufd", "iommufdd_daemon"]
