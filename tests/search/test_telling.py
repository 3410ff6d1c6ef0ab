"""What is written when a search ends, and in which order."""

from accumtune.search.console.telling import Telling


class Recorded:
    """A chronicle, a display and a function in one, which notes what is asked of it."""

    tracker = ui_address = ui_command = None

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append(name)


def test_a_search_has_ended_when_its_report_is_there():
    """The background brings what the journal says: an end before the report would be a finished run without one."""
    told = Recorded()
    Telling(told, told).end("finished", "", None, told.save, is_hurried=False)
    assert told.calls == ["save", "write_report", "end", "stop_tracking"]


def test_its_end_is_written_whatever_happens_to_its_report():
    told = Recorded()
    told.write_report = lambda *arguments: 1 / 0
    try:
        Telling(told, told).end("finished", "", None, told.save, is_hurried=False)
    except ZeroDivisionError:
        assert told.calls == ["save", "end", "stop_tracking"]
    hurried = Recorded()
    Telling(hurried, hurried).end("interrupted", "", None, hurried.save, is_hurried=True)
    assert hurried.calls == ["save", "end", "stop_tracking"]
