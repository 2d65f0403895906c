"""`python -m espnet_mega_plugin.decode`, as `python -m espnet_mega_plugin decode`."""

import sys

from espnet_mega_plugin.decode import main

if __name__ == "__main__":
    sys.exit(main())
