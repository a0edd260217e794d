"""What the config.json of well-known encoders says, so that a network is built without any download."""

from typing import Any

Config = dict[str, Any]

# Names under which the hub has the same files.
ALIASES = {
  "FacebookAI/roberta-base": "roberta-base",
  "FacebookAI/roberta-large": "roberta-large",
  "google-bert/bert-base-uncased": "bert-base-uncased",
  "google-bert/bert-base-chinese": "bert-base-chinese",
}


def _bert(width: int = 768, layers: int = 12, heads: int = 12, **facts: Any) -> Config:
  return {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "intermediate_size": 4 * width,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    **facts,
  }


def _roberta(width: int, layers: int, heads: int) -> Config:
  facts = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
  return _bert(width, layers, heads, **facts, model_type="roberta", layer_norm_eps=1e-5)


def _whisper(width: int, layers: int, mels: int = 80) -> Config:
  return {
    "model_type": "whisper",
    "num_mel_bins": mels,
    "d_model": width,
    "encoder_layers": layers,
    "encoder_attention_heads": width // 64,
    "encoder_ffn_dim": 4 * width,
    "encoder_layerdrop": 0.0,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "scale_embedding": False,
    "init_std": 0.02,
  }


def _speech(kind: str, width: int = 768, layers: int = 12, heads: int = 12, **facts: Any) -> Config:
  return {
    "model_type": kind,
    "hidden_size": width,
    "num_hidden_layers": layers,
    "num_attention_heads": heads,
    "intermediate_size": 4 * width,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.1,
    "layerdrop": 0.1,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": [512] * 7,
    "conv_stride": [5, 2, 2, 2, 2, 2, 2],
    "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "apply_spec_augment": True,
    "mask_time_prob": 0.05,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_feature_prob": 0.0,
    "mask_feature_length": 10,
    "mask_feature_min_masks": 0,
    **facts,
  }


def _data2vec(width: int, layers: int, heads: int) -> Config:
  facts = {"feat_extract_norm": "layer", "feat_proj_dropout": 0.0}
  positions = {"num_conv_pos_embeddings": 5, "conv_pos_kernel_size": 19}
  return _speech("data2vec-audio", width, layers, heads, **facts, **positions)


def _resnet(depths: list[int]) -> Config:
  widths = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512]}
  return {"model_type": "resnet", "layer_type": "basic", "hidden_act": "relu", "depths": depths, **widths}


_PRETRAINING: Config = {"activation_dropout": 0.0, "layerdrop": 0.0}  # wav2vec2 files that were never fine-tuned

CONFIGS: dict[str, Config] = {
  "roberta-base": _roberta(768, 12, 12),
  "roberta-large": _roberta(1024, 24, 16),
  "bert-base-uncased": _bert(),
  "bert-base-chinese": _bert(vocab_size=21128),
  "hfl/chinese-roberta-wwm-ext": _bert(vocab_size=21128),
  "sentence-transformers/all-MiniLM-L6-v2": _bert(384, 6),
  "openai/whisper-tiny": _whisper(384, 4),
  "openai/whisper-tiny.en": _whisper(384, 4),
  "openai/whisper-base": _whisper(512, 6),
  "openai/whisper-base.en": _whisper(512, 6),
  "openai/whisper-small": _whisper(768, 12),
  "openai/whisper-small.en": _whisper(768, 12),
  "openai/whisper-medium": _whisper(1024, 24),
  "openai/whisper-large-v3": _whisper(1280, 32, mels=128),
  "facebook/data2vec-audio-base": _data2vec(768, 12, 12),
  "facebook/data2vec-audio-base-960h": _data2vec(768, 12, 12),
  "facebook/data2vec-audio-large": _data2vec(1024, 24, 16),
  "facebook/data2vec-audio-large-960h": _data2vec(1024, 24, 16),
  "facebook/wav2vec2-base": _speech("wav2vec2", **_PRETRAINING),
  "facebook/wav2vec2-base-960h": _speech("wav2vec2"),
  "facebook/wav2vec2-large": _speech("wav2vec2", 1024, 24, 16, **_PRETRAINING),
  "facebook/wav2vec2-large-960h": _speech("wav2vec2", 1024, 24, 16),
  "facebook/hubert-base-ls960": _speech("hubert"),
  "TencentGameMate/chinese-hubert-base": _speech("hubert"),
  "wav2vec_large": {"model_type": "wav2vec1"},  # fairseq's wav2vec 1.0
  "microsoft/resnet-18": _resnet([2, 2, 2, 2]),
  "microsoft/resnet-34": _resnet([3, 4, 6, 3]),
  "timm/resnet18.tv_in1k": _resnet([2, 2, 2, 2]),  # torchvision's IMAGENET1K_V1
  "timm/resnet34.tv_in1k": _resnet([3, 4, 6, 3]),
  "fabnet": {"model_type": "fabnet"},
}
