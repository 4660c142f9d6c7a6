-- How each user wants memories to be read, scored and found. No row: the defaults.

CREATE TABLE settings (
    tenant_id           uuid             NOT NULL,
    user_id             uuid             NOT NULL,
    language            text             NOT NULL CHECK (language IN (
        'simple', 'english', 'german', 'french', 'spanish', 'italian', 'portuguese')),
    scoring_preset      text             NOT NULL CHECK (scoring_preset IN (
        'balanced', 'factual', 'emotional', 'recent', 'custom')),
    relevance_to_goals  double precision NOT NULL CHECK (relevance_to_goals BETWEEN 0 AND 1),
    emotional_weight    double precision NOT NULL CHECK (emotional_weight BETWEEN 0 AND 1),
    predictive_value    double precision NOT NULL CHECK (predictive_value BETWEEN 0 AND 1),
    recency_frequency   double precision NOT NULL CHECK (recency_frequency BETWEEN 0 AND 1),
    semantic            double precision CHECK (semantic BETWEEN 0 AND 1),
    speaker             double precision CHECK (speaker BETWEEN 0 AND 1),
    memory_score        double precision CHECK (memory_score BETWEEN 0 AND 1),
    freshness           double precision CHECK (freshness BETWEEN 0 AND 1),
    version             bigint           NOT NULL CHECK (version >= 1),
    PRIMARY KEY (user_id, tenant_id),
    -- A thousandth, and a little for the rounding of four numbers.
    CHECK (abs(relevance_to_goals + emotional_weight + predictive_value + recency_frequency - 1)
           <= 0.001000001)
);
COMMENT ON TABLE settings IS 'What a user chose; who never chose has no row.';
COMMENT ON COLUMN settings.relevance_to_goals IS 'With the next three: what the components of a score count.';
COMMENT ON COLUMN settings.semantic IS 'With the next three: what counts in a query''s ranking. NULL: the mesh''s default.';

ALTER TABLE settings ENABLE ROW LEVEL SECURITY;
ALTER TABLE settings FORCE  ROW LEVEL SECURITY;

CREATE POLICY own ON settings TO kimberly_app
    USING (tenant_id = current_tenant() AND user_id = current_user_id());
CREATE POLICY system ON settings TO kimberly_system USING (true);

-- Meditation reads the weights of many users at once.
GRANT SELECT, INSERT, UPDATE ON settings TO kimberly_app;
GRANT SELECT ON settings TO kimberly_system;
