"""The repository on a MongoDB collection; needs pymongo, the extra ``mongo``."""

from taskx.storage.mongo.repository import MongoRepository

__all__ = ["MongoRepository"]
