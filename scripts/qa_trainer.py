"""A Trainer that scores answer texts instead of logits, and the same with pruning during training."""

from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from hf_sparse import SparseTrainerMixin


class QuestionAnsweringTrainer(Trainer):
    """A Trainer that keeps the examples beside their context windows and converts logits to answers.

    Args:
        eval_examples: the questions whose windows are in `eval_dataset`.
        post_process: `f(examples, features, predictions, prefix) -> answers`.
        compute_metrics: `f(answers, examples) -> dict`, called where the examples have the column "answers".
    """

    def __init__(self, *args, eval_examples=None, post_process=None, compute_metrics=None, **kwargs):
        # compute_metrics is not passed on: the Trainer would call it with logits.
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples
        self.post_process = post_process
        self.score_answers = compute_metrics
        self._scored = None

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval", eval_examples=None):
        """Answers and scores `eval_examples` (default: those of the constructor) from the windows `eval_dataset`."""
        features = self.eval_dataset if eval_dataset is None else eval_dataset
        self._scored = (self.eval_examples if eval_examples is None else eval_examples, features)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(self, test_dataset, test_examples, ignore_keys=None, metric_key_prefix: str = "test"):
        """Answers `test_examples`; `predictions` of the result maps their ids to texts."""
        self._scored = (test_examples, test_dataset)
        output = super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        return PredictionOutput(predictions=output.predictions, label_ids=None, metrics=output.metrics)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        # Without compute_metrics the Trainer requests losses only; answers need the logits.
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        examples, features = self._scored
        answers = self.post_process(examples, features, output.predictions, metric_key_prefix)
        metrics = dict(output.metrics)
        if self.score_answers is not None and "answers" in examples.column_names:
            scores = self.score_answers(answers, examples)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        return output._replace(predictions=answers, metrics=metrics)


class SparseQuestionAnsweringTrainer(SparseTrainerMixin, QuestionAnsweringTrainer):
    """A QuestionAnsweringTrainer that prunes during training."""
