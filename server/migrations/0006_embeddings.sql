-- Vectors that stand for the meaning of memories.

ALTER TABLE consents DROP CONSTRAINT consents_purpose_check;
ALTER TABLE consents ADD CONSTRAINT consents_purpose_check
    CHECK (purpose IN ('memory.store', 'memory.embed'));

CREATE TABLE embedding_models (
    tenant_id uuid    NOT NULL,
    user_id   uuid    NOT NULL,
    model     text    NOT NULL CHECK (length(model) BETWEEN 1 AND 64),
    dimension integer NOT NULL CHECK (dimension BETWEEN 2 AND 4000),
    in_graph  boolean NOT NULL DEFAULT false,
    PRIMARY KEY (user_id, model),
    UNIQUE (user_id, model, dimension)
);
COMMENT ON TABLE embedding_models IS 'How long a user''s vectors of a model are: the first one decides.';
COMMENT ON COLUMN embedding_models.in_graph IS 'Whether some of the vectors are in a graph.';

CREATE TABLE embeddings (
    tenant_id    uuid    NOT NULL,
    user_id      uuid    NOT NULL,
    model        text    NOT NULL,
    memory_id    uuid    NOT NULL,
    dimension    integer NOT NULL,
    in_graph     boolean NOT NULL,
    content_hash bytea   NOT NULL CHECK (length(content_hash) = 32),
    vector       halfvec NOT NULL CHECK (vector_dims(vector) = dimension),
    PRIMARY KEY (user_id, model, memory_id),
    FOREIGN KEY (user_id, memory_id) REFERENCES memories (user_id, id) ON DELETE CASCADE,
    FOREIGN KEY (user_id, model, dimension)
        REFERENCES embedding_models (user_id, model, dimension) ON DELETE CASCADE
-- A vector that is read with its row is compared ten times as fast as one that is read apart.
) WITH (toast_tuple_target = 8160);
COMMENT ON TABLE embeddings IS 'Vectors of length 1, one for each memory and model.';
COMMENT ON COLUMN embeddings.content_hash IS 'Of the text that the vector stands for; another text has none.';
COMMENT ON COLUMN embeddings.in_graph IS 'False: found by scanning, as the first few thousand of each user and model are.';

CREATE INDEX embeddings_by_memory ON embeddings (user_id, memory_id);

-- A graph for each usual dimension, which the models of that dimension share: models are named by
-- users at any time and dimensions are few, so that no statement has to make an index. Vectors of
-- other dimensions are scanned. Users with few vectors are in no graph: they pay nothing for it,
-- and those who are find less in their way.
CREATE INDEX embeddings_graph_64 ON embeddings
    USING hnsw ((vector::halfvec(64)) halfvec_ip_ops) WHERE in_graph AND dimension = 64;
CREATE INDEX embeddings_graph_128 ON embeddings
    USING hnsw ((vector::halfvec(128)) halfvec_ip_ops) WHERE in_graph AND dimension = 128;
CREATE INDEX embeddings_graph_256 ON embeddings
    USING hnsw ((vector::halfvec(256)) halfvec_ip_ops) WHERE in_graph AND dimension = 256;
CREATE INDEX embeddings_graph_384 ON embeddings
    USING hnsw ((vector::halfvec(384)) halfvec_ip_ops) WHERE in_graph AND dimension = 384;
CREATE INDEX embeddings_graph_512 ON embeddings
    USING hnsw ((vector::halfvec(512)) halfvec_ip_ops) WHERE in_graph AND dimension = 512;
CREATE INDEX embeddings_graph_768 ON embeddings
    USING hnsw ((vector::halfvec(768)) halfvec_ip_ops) WHERE in_graph AND dimension = 768;
CREATE INDEX embeddings_graph_1024 ON embeddings
    USING hnsw ((vector::halfvec(1024)) halfvec_ip_ops) WHERE in_graph AND dimension = 1024;
CREATE INDEX embeddings_graph_1536 ON embeddings
    USING hnsw ((vector::halfvec(1536)) halfvec_ip_ops) WHERE in_graph AND dimension = 1536;
CREATE INDEX embeddings_graph_3072 ON embeddings
    USING hnsw ((vector::halfvec(3072)) halfvec_ip_ops) WHERE in_graph AND dimension = 3072;

ALTER TABLE embedding_models ENABLE ROW LEVEL SECURITY;
ALTER TABLE embedding_models FORCE  ROW LEVEL SECURITY;
ALTER TABLE embeddings       ENABLE ROW LEVEL SECURITY;
ALTER TABLE embeddings       FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON embedding_models TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY own ON embeddings TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());

GRANT SELECT, INSERT, UPDATE, DELETE ON embedding_models, embeddings TO kimberly_app;
