"""See tests.catalog.versions."""

from tests.catalog.versions import main

main()
