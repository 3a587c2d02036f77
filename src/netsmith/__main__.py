"""`python -m netsmith` is `netsmith`."""

from netsmith.cli import main

raise SystemExit(main())
