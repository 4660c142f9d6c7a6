-- Vectors that a local model makes, for users who chose one.

ALTER TABLE settings
    ADD COLUMN embedding_model text NOT NULL DEFAULT '' CHECK (length(embedding_model) <= 64);
COMMENT ON COLUMN settings.embedding_model IS 'The local model that makes vectors of the user''s memories; empty: none does.';

-- A job that gives its user's memories vectors hands its key back in the user's transaction that
-- finds nothing missing. The lock that keeps vectors under the job's lease needs the grant, too.
GRANT UPDATE (unique_key) ON jobs TO kimberly_app;
