"""Load tests of a deployment, for Locust (https://locust.io):

    locust -f loadtest/locustfile.py --deployment deployment.json                          web page on :8089
    locust -f loadtest/locustfile.py --deployment deployment.json --headless --scenario rush-hour --minutes 5
    locust -f loadtest/locustfile.py --deployment deployment.json --headless --processes 4     four workers
    locust -f loadtest/locustfile.py --master --expect-workers 8 …   and on other machines   … --worker --master-host …

`python -m loadtest accounts` makes accounts on a deployment and writes deployment.json; `make loadtest` starts a system
of its own. How many users there are is the scenario's affair: Locust's numbers of users and spawn rate do not apply.
"""

from loadtest.load.users import (
    AlertOfficers,
    FeedReader,
    PageOperator,
    PartnerReaders,
    PartnerSender,
    ScenarioShape,
)

__all__ = ["AlertOfficers", "FeedReader", "PageOperator", "PartnerReaders", "PartnerSender", "ScenarioShape"]
