"""Who judges: guardengine serve at GUARDENGINE_URL, with the key in GUARDENGINE_API_KEY if it wants one."""

import os

from guardengine.integrations.guard import Guard
from guardengine.integrations.nemo import register


def init(app):
    register(app, Guard(os.environ["GUARDENGINE_URL"], api_key=os.environ.get("GUARDENGINE_API_KEY")))
