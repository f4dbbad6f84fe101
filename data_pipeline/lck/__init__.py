"""The TFDS dataset `lck`: images, regions and scored statements, in array_record files."""

from data_pipeline.lck.lck_dataset_builder import build_lck, publish_lck, verify

__all__ = ["build_lck", "publish_lck", "verify"]
