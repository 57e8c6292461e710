"""The date that chat templates write: a fixed one, so that a run that goes on tomorrow has the same prompts.

transformers gives templates the function strftime_now; those of Llama 3, Granite 3 and SmolLM3 write the day with it.
"""

import datetime
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import chat_template_utils

from todi.errors import InputError
from todi.runtime.distributed import World
from todi.settings import TODAY


class TemplateDate:
    """A date, and whether any template has asked for it.

    Args:
        wanted: the setting: `TODAY`, or a date in ISO form.
        earlier: what `noted` was when this began, if it did: then that is meant by today.
    """

    def __init__(self, wanted: str = TODAY, earlier: str | None = None):
        started = earlier if earlier not in (None, TODAY) else datetime.date.today().isoformat()
        self._date = started if wanted == TODAY else wanted
        self._used = False

    @property
    def noted(self) -> str:
        """What depends on it must remember: the date where a template has asked for it, else `TODAY`."""
        return self._date if self._used else TODAY

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Until the block ends, templates see this date, at midnight."""
        clock = chat_template_utils.datetime
        chat_template_utils.datetime = self
        try:
            yield
        finally:
            chat_template_utils.datetime = clock

    def now(self) -> datetime.datetime:
        """What the function of the templates calls."""
        self._used = True
        return datetime.datetime.fromisoformat(self._date)


def noted_date(noted: str) -> dict[str, str]:
    """The entry "template_date" of what describes responses; none where no template writes a date.

    Args:
        noted: `TemplateDate.noted`.
    """
    return {} if noted == TODAY else {"template_date": noted}


def check_same_date(noted: str, world: World) -> None:
    """Raises InputError where the ranks have different dates: midnight passed, or a node lacks the run's files."""
    dates = sorted(set(world.gather(noted)))
    if len(dates) > 1:
        raise InputError(f"the processes have different dates for the chat template, {' and '.join(dates)}; say which "
                         "with --template-date (TEMPLATE_DATE)")
