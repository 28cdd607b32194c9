"""The fixtures of the tests of the example scripts."""

from helpers.scripts import fresh_script_loggers, one_thread, tiny_bert, tiny_bert_qa, tiny_gpt2, tiny_llama


__all__ = ["fresh_script_loggers", "one_thread", "tiny_bert", "tiny_bert_qa", "tiny_gpt2", "tiny_llama"]
