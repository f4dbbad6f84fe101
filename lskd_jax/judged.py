"""Judgements as training data: a corpus of judged statements, and their columns of a batch."""
from collections.abc import Callable
import dataclasses

import numpy as np

from data_pipeline.corpus import Corpus
from data_pipeline.judge import Judgement, read_judgements
from data_pipeline.records import DataError
