"""The job: one TOML file that says everything about a run, read into frozen, checked values.

Every key has a default, so an empty file is a job. Unknown keys are errors; all problems are reported
together, one line each with key, value, limit and remedy. A value whose feature is not built yet is refused,
never ignored: the others are `available` in their field.
"""

from fedtune.job.agreement import disagreements
from fedtune.job.reading import job_from, load_job, load_raw, parse_job
from fedtune.job.sections import (
    AdapterSection,
    DataSection,
    DeviceClass,
    EvaluationSection,
    FederationSection,
    ModelSection,
    PrivacySection,
    SimulationSection,
    UnitsSection,
)
from fedtune.job.text import toml_value
from fedtune.job.whole import Job
from fedtune.job.writing import to_toml

__all__ = [
    "AdapterSection",
    "DataSection",
    "DeviceClass",
    "EvaluationSection",
    "FederationSection",
    "Job",
    "ModelSection",
    "PrivacySection",
    "SimulationSection",
    "UnitsSection",
    "disagreements",
    "job_from",
    "load_job",
    "load_raw",
    "parse_job",
    "to_toml",
    "toml_value",
]
