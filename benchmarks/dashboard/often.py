"""`headwater` whose operating page ticks more often, so that cost.py can measure what a tick costs.

python benchmarks/dashboard/often.py PERIOD_S serve ...
"""

import sys

from headwater.cli.main import main
from headwater.http_api.dashboard.broadcast import Broadcast

if __name__ == "__main__":
    defaults = Broadcast.__init__.__kwdefaults__
    assert "period_s" in defaults
    defaults["period_s"] = float(sys.argv.pop(1))
    main()
