"""Who may call which method. A method without a row is denied, here and in every Envoy."""

import enum
from collections.abc import Mapping


class Access(enum.Enum):
    """What a caller must show."""

    ANYONE = "anyone"
    """Nothing: callable through the edge without a token, and by every workload of the mesh."""

    USER = "user"
    """A user's access token, verified by edge, sidecar and service."""

    AUDITOR = "auditor"
    """As USER; and the user may look at the tenant: an auditor, an admin or an owner."""

    ADMIN = "admin"
    """As USER; and the user may change the tenant: an admin or an owner."""

    WORKER = "worker"
    """The SPIFFE identity of a worker. Never reachable through the edge."""

    WORKLOAD = "workload"
    """Any SPIFFE identity of the mesh. Never reachable through the edge."""


class Role(enum.StrEnum):
    """What a user may do in their tenant."""

    OWNER = "owner"
    ADMIN = "admin"
    MEMBER = "member"
    AUDITOR = "auditor"


ROLES: Mapping[Access, frozenset[Role]] = {
    Access.USER: frozenset(Role),
    Access.AUDITOR: frozenset({Role.OWNER, Role.ADMIN, Role.AUDITOR}),
    Access.ADMIN: frozenset({Role.OWNER, Role.ADMIN}),
}
"""Whose access token opens what asks for one."""


class Scope(enum.StrEnum):
    """What an access token is good for."""

    USER = "user"
    """All that its user may do: the tokens of a log-in."""

    MEMORY_READ = "memory.read"
    MEMORY_WRITE = "memory.write"
    MEMORY_SENSITIVE = "memory.sensitive"
    """Opens no method: to an agent without it, sensitive memories are not there."""
    JOBS_READ = "jobs.read"
    PROFILE_READ = "profile.read"
    AUDIT_READ = "audit.read"


REFLECTION = "grpc.reflection.v1alpha.ServerReflection"

METHODS: Mapping[str, Access] = {
    "/kimberly.auth.v1.AuthService/SignUp": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/LogIn": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/RefreshToken": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/LogOut": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/GetJwks": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/LogOutEverywhere": Access.USER,
    "/kimberly.auth.v1.AuthService/ListSessions": Access.USER,
    "/kimberly.auth.v1.AuthService/RevokeSession": Access.USER,
    "/kimberly.auth.v1.AuthService/ChangePassword": Access.USER,
    "/kimberly.auth.v1.AuthService/RequestPasswordReset": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/ResetPassword": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/RequestEmailVerification": Access.USER,
    "/kimberly.auth.v1.AuthService/VerifyEmail": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/AcceptInvitation": Access.USER,
    "/kimberly.auth.v1.AuthService/ListTenants": Access.USER,
    "/kimberly.auth.v1.AuthService/SwitchTenant": Access.USER,
    "/kimberly.auth.v1.AuthService/LeaveTenant": Access.USER,
    "/kimberly.auth.v1.AuthService/CreateApiKey": Access.USER,
    "/kimberly.auth.v1.AuthService/ListApiKeys": Access.USER,
    "/kimberly.auth.v1.AuthService/RotateApiKey": Access.USER,
    "/kimberly.auth.v1.AuthService/RevokeApiKey": Access.USER,
    "/kimberly.auth.v1.AuthService/ExchangeToken": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/IssueToken": Access.ANYONE,
    "/kimberly.auth.v1.AuthService/GetOpenIdConfiguration": Access.ANYONE,
    "/kimberly.auth.v1.TenantService/ListMembers": Access.AUDITOR,
    "/kimberly.auth.v1.TenantService/AssignRole": Access.ADMIN,
    "/kimberly.auth.v1.TenantService/DisableMember": Access.ADMIN,
    "/kimberly.auth.v1.TenantService/EnableMember": Access.ADMIN,
    "/kimberly.auth.v1.TenantService/RemoveMember": Access.ADMIN,
    "/kimberly.auth.v1.TenantService/LogOutMember": Access.ADMIN,
    "/kimberly.auth.v1.TenantService/CreateInvitation": Access.ADMIN,
    "/kimberly.auth.v1.TenantService/ListInvitations": Access.AUDITOR,
    "/kimberly.auth.v1.TenantService/RevokeInvitation": Access.ADMIN,
    "/kimberly.users.v1.UserService/GetUser": Access.USER,
    "/kimberly.users.v1.UserService/UpdateUser": Access.USER,
    "/kimberly.users.v1.UserService/GetSettings": Access.USER,
    "/kimberly.users.v1.UserService/UpdateSettings": Access.USER,
    "/kimberly.users.v1.UserService/RecordConsent": Access.USER,
    "/kimberly.users.v1.UserService/ListConsents": Access.USER,
    "/kimberly.users.v1.UserService/ListAuditEvents": Access.USER,
    "/kimberly.users.v1.UserService/ListAuditLinks": Access.USER,
    "/kimberly.users.v1.UserService/VerifyAuditLog": Access.USER,
    "/kimberly.users.v1.AuditWorkService/SignCheckpoints": Access.WORKER,
    "/kimberly.billing.v1.BillingService/ListPlans": Access.USER,
    "/kimberly.billing.v1.BillingService/GetSubscription": Access.USER,
    "/kimberly.billing.v1.BillingService/ChangeSubscription": Access.USER,
    "/kimberly.billing.v1.BillingService/ListUsage": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/CreateErasure": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/GetErasure": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/GetErasureReceipt": Access.ANYONE,
    "/kimberly.privacy.v1.PrivacyService/CreateExport": Access.USER,
    "/kimberly.privacy.v1.PrivacyService/GetExport": Access.USER,
    "/kimberly.privacy.v1.PrivacyWorkService/EraseUser": Access.WORKER,
    "/kimberly.privacy.v1.PrivacyWorkService/ExportUser": Access.WORKER,
    "/kimberly.privacy.v1.PrivacyWorkService/ExpireExport": Access.WORKER,
    "/kimberly.memory.v1.MemoryService/CreateMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/UpdateMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/BatchCreateMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListMemoryVersions": Access.USER,
    "/kimberly.memory.v1.MemoryService/ArchiveMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/RestoreMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/ProtectMemory": Access.USER,
    "/kimberly.memory.v1.MemoryService/GiveFeedback": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetUsage": Access.USER,
    "/kimberly.memory.v1.MemoryService/QueryMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/ImportMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetImport": Access.USER,
    "/kimberly.memory.v1.MemoryService/ExportMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/WatchMemories": Access.USER,
    "/kimberly.memory.v1.MemoryService/UploadEmbeddings": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteEmbeddings": Access.USER,
    "/kimberly.memory.v1.MemoryService/CreateAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/CompleteAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListAttachments": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteAttachment": Access.USER,
    "/kimberly.memory.v1.MemoryService/AppendToSession": Access.USER,
    "/kimberly.memory.v1.MemoryService/EndSession": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetTranscript": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteTranscript": Access.USER,
    "/kimberly.memory.v1.MemoryService/Meditate": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetMeditation": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListMeditations": Access.USER,
    "/kimberly.memory.v1.MemoryService/UndoMeditation": Access.USER,
    "/kimberly.memory.v1.MemoryService/CreateGoal": Access.USER,
    "/kimberly.memory.v1.MemoryService/GetGoal": Access.USER,
    "/kimberly.memory.v1.MemoryService/ListGoals": Access.USER,
    "/kimberly.memory.v1.MemoryService/UpdateGoal": Access.USER,
    "/kimberly.memory.v1.MemoryService/DeleteGoal": Access.USER,
    "/kimberly.scoring.v1.ScoringService/PlanMeditation": Access.WORKER,
    "/kimberly.scoring.v1.ScoringService/Score": Access.WORKER,
    "/kimberly.embedding.v1.EmbeddingService/Embed": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/SweepMemories": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/RewrapDataKeys": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/ReindexMemories": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/PromoteShortTerm": Access.WORKER,
    "/kimberly.maintenance.v1.MaintenanceService/SweepAttachments": Access.WORKER,
    "/kimberly.jobs.v1.JobService/CreateJob": Access.USER,
    "/kimberly.jobs.v1.JobService/GetJob": Access.USER,
    "/kimberly.jobs.v1.JobService/ListJobs": Access.USER,
    "/kimberly.jobs.v1.JobService/RetryJob": Access.USER,
    "/kimberly.jobs.v1.JobService/CancelJob": Access.USER,
    "/kimberly.jobs.v1.JobService/WatchJob": Access.USER,
    "/kimberly.jobs.v1.JobService/CreateSchedule": Access.USER,
    "/kimberly.jobs.v1.JobService/GetSchedule": Access.USER,
    "/kimberly.jobs.v1.JobService/ListSchedules": Access.USER,
    "/kimberly.jobs.v1.JobService/PauseSchedule": Access.USER,
    "/kimberly.jobs.v1.JobService/ResumeSchedule": Access.USER,
    "/kimberly.jobs.v1.JobService/DeleteSchedule": Access.USER,
    "/kimberly.jobs.v1.WorkerService/Work": Access.WORKER,
    "/kimberly.agents.v1.AgentService/RegisterAgent": Access.USER,
    "/kimberly.agents.v1.AgentService/GetAgent": Access.USER,
    "/kimberly.agents.v1.AgentService/ListAgents": Access.USER,
    "/kimberly.agents.v1.AgentService/DisableAgent": Access.USER,
    "/kimberly.agents.v1.AgentService/EnableAgent": Access.USER,
    "/kimberly.agents.v1.AgentService/DeleteAgent": Access.USER,
    "/kimberly.agents.v1.AgentService/RotateAgentKey": Access.USER,
    "/kimberly.agents.v1.AgentService/RunAgentTask": Access.USER,
    "/kimberly.agents.v1.AgentService/GetAgentTask": Access.USER,
    "/kimberly.agents.v1.AgentService/ListAgentTasks": Access.USER,
    "/kimberly.agents.v1.AgentService/CancelAgentTask": Access.USER,
    "/kimberly.agents.v1.AgentWorkService/ReadSession": Access.WORKER,
    "/kimberly.agents.v1.AgentWorkService/KeepSummary": Access.WORKER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.USER,
    "/grpc.health.v1.Health/Check": Access.WORKLOAD,
}

_MEMORY = "/kimberly.memory.v1.MemoryService/"
_USERS = "/kimberly.users.v1.UserService/"
_JOBS = "/kimberly.jobs.v1.JobService/"

SCOPES: Mapping[str, Scope] = {
    **dict.fromkeys(
        (
            f"{_MEMORY}GetMemory",
            f"{_MEMORY}ListMemories",
            f"{_MEMORY}ListMemoryVersions",
            f"{_MEMORY}QueryMemories",
            f"{_MEMORY}GetUsage",
            f"{_MEMORY}GetImport",
            f"{_MEMORY}ExportMemories",
            f"{_MEMORY}WatchMemories",
            f"{_MEMORY}GetAttachment",
            f"{_MEMORY}ListAttachments",
            f"{_MEMORY}GetTranscript",
            f"{_MEMORY}GetMeditation",
            f"{_MEMORY}ListMeditations",
            f"{_MEMORY}GetGoal",
            f"{_MEMORY}ListGoals",
        ),
        Scope.MEMORY_READ,
    ),
    **dict.fromkeys(
        (
            f"{_MEMORY}CreateMemory",
            f"{_MEMORY}UpdateMemory",
            f"{_MEMORY}DeleteMemory",
            f"{_MEMORY}BatchCreateMemories",
            f"{_MEMORY}ImportMemories",
            f"{_MEMORY}ArchiveMemory",
            f"{_MEMORY}RestoreMemory",
            f"{_MEMORY}ProtectMemory",
            f"{_MEMORY}GiveFeedback",
            f"{_MEMORY}UploadEmbeddings",
            f"{_MEMORY}DeleteEmbeddings",
            f"{_MEMORY}CreateAttachment",
            f"{_MEMORY}CompleteAttachment",
            f"{_MEMORY}DeleteAttachment",
            f"{_MEMORY}AppendToSession",
            f"{_MEMORY}EndSession",
            f"{_MEMORY}DeleteTranscript",
            f"{_MEMORY}Meditate",
            f"{_MEMORY}UndoMeditation",
            f"{_MEMORY}CreateGoal",
            f"{_MEMORY}UpdateGoal",
            f"{_MEMORY}DeleteGoal",
        ),
        Scope.MEMORY_WRITE,
    ),
    **dict.fromkeys(
        (
            f"{_JOBS}GetJob",
            f"{_JOBS}ListJobs",
            f"{_JOBS}WatchJob",
            f"{_JOBS}GetSchedule",
            f"{_JOBS}ListSchedules",
        ),
        Scope.JOBS_READ,
    ),
    **dict.fromkeys(
        (f"{_USERS}GetUser", f"{_USERS}GetSettings", f"{_USERS}ListConsents"), Scope.PROFILE_READ
    ),
    **dict.fromkeys(
        (
            f"{_USERS}ListAuditEvents",
            f"{_USERS}ListAuditLinks",
            f"{_USERS}VerifyAuditLog",
        ),
        Scope.AUDIT_READ,
    ),
}
"""The scope that opens a method to a token that is not good for everything.

A method of users without a row here asks for Scope.USER: what is new is closed to API keys.
"""
OPEN_TO_ERASED = frozenset(
    {
        "/kimberly.auth.v1.AuthService/LeaveTenant",
        "/kimberly.privacy.v1.PrivacyService/CreateErasure",
        "/kimberly.privacy.v1.PrivacyService/GetErasure",
    }
)
"""What a user who is being erased may still call: to ask again is to be told the same."""

PROCESSES: Mapping[str, tuple[str, ...]] = {
    "auth": (
        "kimberly.auth.v1.AuthService",
        "kimberly.auth.v1.TenantService",
        "kimberly.users.v1.UserService",
        "kimberly.users.v1.AuditWorkService",
        "kimberly.privacy.v1.PrivacyService",
        "kimberly.billing.v1.BillingService",
        REFLECTION,
    ),
    "memory": (
        "kimberly.memory.v1.MemoryService",
        "kimberly.scoring.v1.ScoringService",
        "kimberly.embedding.v1.EmbeddingService",
        "kimberly.maintenance.v1.MaintenanceService",
        "kimberly.privacy.v1.PrivacyWorkService",
        "kimberly.agents.v1.AgentWorkService",
    ),
    "jobs": (
        "kimberly.jobs.v1.JobService",
        "kimberly.jobs.v1.WorkerService",
        "kimberly.agents.v1.AgentService",
    ),
}
"""Which process serves which services. The auth process answers reflection for all of them."""

PUBLIC = frozenset({Access.ANYONE, *ROLES})
"""What the edge passes on."""

EDGE = "edge"
WORKER = "worker"


def methods_of(process: str) -> dict[str, Access]:
    """Return the methods that one process serves, health included."""
    prefixes = (*PROCESSES[process], "grpc.health.v1.Health")
    return {
        method: access for method, access in METHODS.items() if method.split("/")[1] in prefixes
    }


def scope_of(method: str) -> Scope:
    """Return the scope that opens a method of users, beside Scope.USER, which opens all."""
    return SCOPES.get(method, Scope.USER)


def public_services() -> list[str]:
    """Return the services that users may call through the edge, reflection left out."""
    return sorted(
        {method.split("/")[1] for method, access in METHODS.items() if access in PUBLIC}
        - {REFLECTION}
    )


def spiffe_id(trust_domain: str, namespace: str, process: str) -> str:
    """Return the SPIFFE identity of a process, such as spiffe://kimberly.local/ns/prod/sa/auth."""
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{process}"
