"""fedtune validate: checks a job without running it."""

from fedtune.cli.common import JobArgument, SetOption, out, shell
from fedtune.job import load_job

EXAMPLES = "Examples:  fedtune validate job.toml   |   fedtune validate job.toml --set federation.rounds=50"


@shell
def command(job: JobArgument = None, set_: SetOption = None) -> None:
    """Checks every key of a job and reports all problems at once."""
    load_job(job, set_ or ())
    out.print(f"{job or 'default job'}: valid", markup=False, highlight=False)
