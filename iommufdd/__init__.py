"""iommufdd: Linux's /dev/iommu as a userspace daemon over emulated IOMMU hardware."""

__version__ = "0.1.0"
