"""Production for real: images, containers, services. Run by `make production-test`."""
